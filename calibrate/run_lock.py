"""A lock on a run's folder, which the system releases however its process ends."""

import fcntl
import os
from pathlib import Path

from matgptq_vllm.core.errors import InputError

LOCK_FILE = "lock"


class RunLock:
    """The lock of one run folder, held until ``release``.

    Args:
        directory: the run's folder; made if it is not there.
        target: what the run writes, for messages.

    Raises:
        InputError: another process holds it.
    """

    def __init__(self, directory: Path, target: Path):
        path = directory / LOCK_FILE
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # a run that ended just now has removed the folder
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._descriptor, 32, 0).decode() or "unknown"
                os.close(self._descriptor)
                raise InputError(
                    f"another run (process {holder}) is writing {target}; wait until it ends, or choose another --out"
                ) from None
            if _is_file_at(self._descriptor, path):
                break
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        os.close(self._descriptor)


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one called ``path``: a run that ended may have removed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
