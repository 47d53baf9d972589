"""Keeps the tenants in force up to date with their file while the server runs.

A thread of its own looks at the file once a second, so that a request never waits for a disk: it reads an attribute. A
wrong file is logged, with the line, and the tenants read before stay in force.
"""

import hashlib
import logging
import os
import threading

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import Catalogue
from serve.tenant_file import parse_tenants, read_bounded
from serve.tenants import Tenants

INTERVAL_S = 1.0
"""Seconds between two looks at the file."""

_logger = logging.getLogger(__name__)

_Signature = tuple[int, int, int, int, int]


class TenantReload:
    """The tenants of one file.

    Args:
        path: the tenant file. It may be a link; replacing it by a rename is noticed like a change in place.
        catalogue: the profiles that the replica holds, None if they are not known yet (``bind`` tells them later).
        interval_s: seconds between two looks at the file. None: no thread, only ``check`` looks.

    Raises:
        FormatError: the file is wrong: there is nothing older to keep in force. OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], catalogue: Catalogue | None = None, interval_s: float | None = INTERVAL_S):
        self.path = os.fspath(path)
        self._catalogue = catalogue
        # One look at a time: `bind` may be called while the thread runs.
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: str | None = None
        self._read_again = True
        self._signature: _Signature | None = None
        self._digest = b""
        self._tenants = self._load()
        self._thread = threading.Thread(target=self._run, args=(interval_s,), name="tenant-file", daemon=True)
        if interval_s is not None:
            self._thread.start()

    def current(self) -> Tenants:
        """The tenants in force; the same object until the file changes."""
        return self._tenants

    @property
    def error(self) -> str | None:
        """Why the file as it is now is not in force; None if it is."""
        return self._error

    def bind(self, catalogue: Catalogue) -> None:
        """The replica's profiles are known: check the file against them, now and at every change.

        Raises:
            FormatError: the file names a profile that is not held. OSError: it cannot be read.
        """
        with self._lock:
            self._catalogue = catalogue
            self._tenants = self._load()

    def close(self) -> None:
        """Stop looking at the file; what is in force stays."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> bool:
        """Look at the file once; whether other tenants are in force now. Raises nothing that a file can cause."""
        with self._lock:
            try:
                signature = _signature(self.path)
                if signature == self._signature and not self._read_again:
                    return False
                data = read_bounded(self.path)
            except (OSError, FormatError) as error:
                self._signature, self._digest = None, b""
                self._refuse(str(error))
                return False
            # Two changes within one tick of the file system's clock have one signature: look once more after each.
            self._read_again = signature != self._signature
            self._signature = signature
            digest = hashlib.sha256(data).digest()
            if digest == self._digest:
                return False
            self._digest = digest
            try:
                tenants = parse_tenants(data, self.path, self._catalogue)
            except FormatError as error:
                self._refuse(str(error))
                return False
            before, self._tenants, self._error = self._tenants, tenants, None
        added, removed = set(tenants.names) - set(before.names), set(before.names) - set(tenants.names)
        _logger.info(
            "%s: %d tenants with %d keys are in force; added: %s; removed: %s",
            self.path,
            len(tenants),
            tenants.num_keys,
            ", ".join(sorted(added)) or "none",
            ", ".join(sorted(removed)) or "none",
        )
        return True

    def _load(self) -> Tenants:
        """The tenants in the file now; errors are the caller's."""
        signature = _signature(self.path)
        data = read_bounded(self.path)
        tenants = parse_tenants(data, self.path, self._catalogue)
        self._signature, self._digest = signature, hashlib.sha256(data).digest()
        self._read_again, self._error = True, None
        return tenants

    def _refuse(self, message: str) -> None:
        if message != self._error:
            _logger.error("%s; the tenants that were read before stay in force", message)
        self._error = message

    def _run(self, interval_s: float) -> None:
        while not self._stop.wait(interval_s):
            try:
                self.check()
            except Exception:
                # A bug must not end reloading for good, and silently.
                _logger.exception("looking at the tenant file %s failed", self.path)


def _signature(path: str) -> _Signature:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
