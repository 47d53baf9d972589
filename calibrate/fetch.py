"""Get the part of a parent that a replica of some width reads: the small files and the leading planes, nothing else.

A parent at width 4 is half of its code bytes; the copy is a valid parent of that width (docs/format.md).
"""

import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from calibrate.options import FetchOptions
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.folder_swap import partial_directory, put_in_place, restore_interrupted
from matgptq_vllm.core.manifest import MANIFEST_FILE
from matgptq_vllm.core.storage import plane_bytes

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.md", "*.model")
"""Configuration, tokenizer, templates: everything beside the weights, which are ``*.safetensors``."""

Get = Callable[[Sequence[str]], None]
"""Brings the files that match any of the patterns into the partial folder."""


def fetch(options: FetchOptions) -> tuple[Path, int, int]:
    """Bring the parent to ``options.out``; returns it, with the bytes of its weights there, and of the planes left out.

    A folder that is there already, with the same manifest and whole at that width, is kept. A download takes up where it was
    interrupted. Every tensor is checked against its digest before the folder gets its name.

    Raises:
        InputError: there is no such folder or repository, or ``options.out`` holds something else.
        FormatError: what came is not a whole parent.
    """
    out = options.out
    restore_interrupted(out)
    partial = partial_directory(out)
    local = options.model.is_dir()
    if not local and (options.model.is_absolute() or str(options.model).count("/") != 1):
        raise InputError(f"{options.model} is neither the folder of a parent nor a repository such as ORGANIZATION/NAME")
    if local and options.model.resolve() == out.resolve():
        raise InputError(f"{out} is the parent itself; give another folder as --out")
    partial.mkdir(parents=True, exist_ok=True)
    get = _copier(options.model, partial) if local else _downloader(str(options.model), options.revision, partial)
    get(SMALL_FILES)
    if not (partial / MANIFEST_FILE).is_file():
        # A hub that cannot be reached is no error to its client library as long as the folder exists.
        raise InputError(f"{options.model} holds no parent, or cannot be reached; is HF_HUB_OFFLINE set?")
    reader = ParentReader(partial)
    files = reader.files(options.max_width)
    if out.exists():
        if not (out / MANIFEST_FILE).is_file():
            raise InputError(f"{out} exists and is no parent; remove it, or give another folder as --out")
        same = (out / MANIFEST_FILE).read_bytes() == (partial / MANIFEST_FILE).read_bytes()
        if same and all((out / file).is_file() for file in files):
            shutil.rmtree(partial)
            return out, *_sizes(ParentReader(out), options.max_width)
    get(files)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the download's own notes
    for _ in tqdm(reader.tensors(options.max_width), desc="Verifying", unit=" tensors"):
        pass
    sizes = _sizes(reader, options.max_width)
    put_in_place(out)
    return out, *sizes


def _copier(source: Path, partial: Path) -> Get:
    ParentReader(source)  # what is wrong with it is said with its own name

    def get(patterns: Sequence[str]) -> None:
        paths = [path for path in source.rglob("*") if path.is_file()]
        wanted = [path for path in paths if any(fnmatch(str(path.relative_to(source)), pattern) for pattern in patterns)]
        for path in tqdm(wanted, desc="Copying", unit=" files"):
            target = partial / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    return get


def _downloader(repository: str, revision: str | None, partial: Path) -> Get:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    def get(patterns: Sequence[str]) -> None:
        try:
            snapshot_download(repository, revision=revision, local_dir=partial, allow_patterns=list(patterns))
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise InputError(
                f"there is no folder {repository!r}, and no such repository or revision that this machine may read; "
                "HF_TOKEN holds the token of a private one"
            ) from error
        except HfHubHTTPError as error:
            raise OSError(
                f"{repository} could not be downloaded ({error}); the same command goes on where it stopped"
            ) from error

    return get


def _sizes(reader: ParentReader, max_width: int) -> tuple[int, int]:
    """Bytes of the weight files that a replica of ``max_width`` opens, and of the planes that it leaves alone."""
    ours = sum((reader.directory / file).stat().st_size for file in reader.files(max_width))
    return ours, sum(plane_bytes(reader)[reader.num_planes(max_width) :])
