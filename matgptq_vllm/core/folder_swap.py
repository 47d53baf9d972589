"""Make a folder appear, or be replaced, in one step: it is filled under another name and renamed when it is whole.

Beside a folder ``name``, ``.name.partial`` is what is being filled and ``.name.replaced`` the old one, for the moment
between the two renames. Standard library only.
"""

import os
import shutil
from pathlib import Path


def partial_directory(directory: Path) -> Path:
    """Where a folder lies until it is whole."""
    return directory.with_name(f".{directory.name}.partial")


def restore_interrupted(directory: Path) -> None:
    """Give an old folder its name back if a run was killed between the two renames that replace it."""
    directory = directory.absolute()
    replaced = _replaced_directory(directory)
    if replaced.exists() and not directory.exists():
        replaced.rename(directory)


def put_in_place(directory: Path) -> None:
    """Give ``partial_directory(directory)`` its name; what had that name is removed.

    Raises:
        OSError: a rename failed; what had the name still has it.
    """
    partial, replaced = partial_directory(directory), _replaced_directory(directory)
    sync(partial)
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
        try:
            partial.rename(directory)
        except OSError:
            replaced.rename(directory)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(directory)
    sync(directory.parent)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaced_directory(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")
