"""The journal of a search: every measurement, written as it is made, so that a killed search repeats none of them.

A search is a pure function of its measurements. Running the same command again therefore walks the same way: as far as the
journal reaches, measurements come from it, and from there on they are made. One JSON document per line: first the inputs,
then ``{"widths": [width of every unit], "kl": {window: divergence}}``, and ``{"stored": [name]}`` once the result is
being stored. A last line that was cut off is dropped.
"""

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from calibrate.search.units import Genome
from matgptq_vllm.core.errors import FormatError, InputError

JOURNAL_FILE = ".matgptq_search.jsonl"
"""In the parent's folder while a search of it is unfinished. No reader of parents looks at it."""


class Journal:
    """Context manager around the journal of the search that runs on one parent; only one may run at a time.

    Args:
        directory: the parent.
        inputs: what the measurements depend on, as JSON values; a journal of other inputs is not continued.
        restart: drop what an unfinished search has measured.

    Raises (on entering):
        InputError: another search of this parent is running, or an unfinished one had other inputs.
        FormatError: the journal was altered.
        OSError: the folder cannot be written.
    """

    def __init__(self, directory: Path, inputs: Mapping[str, str], restart: bool = False):
        self.path = directory / JOURNAL_FILE
        self.measured: dict[Genome, dict[int, float]] = {}
        """Divergence of every genome on every window measured so far."""
        self.stored: set[str] = set()
        """Names of profiles that the search had begun to store: those in the parent's table may be its own."""
        self._inputs = dict(inputs)
        self._restart = restart
        self._file: IO[str] | None = None

    def __enter__(self) -> "Journal":
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"another search of {self.path.parent} is running; wait for it, or search a copy") from None
        try:
            self._file = file
            self._replay(file)
        except BaseException:
            file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        if not self.measured and self.path.exists():
            self.remove()
        self._file.close()

    def add(self, genome: Genome, divergences: Mapping[int, float]) -> None:
        """Record measurements of one genome: window -> divergence."""
        self.measured.setdefault(genome, {}).update(divergences)
        self._write({"widths": list(genome), "kl": {str(window): value for window, value in divergences.items()}})

    def mark_stored(self, names: Iterable[str]) -> None:
        """Record that from now on profiles of these names are being stored."""
        self._write({"stored": sorted(names)})

    def remove(self) -> None:
        """Delete the journal of a search whose result is stored."""
        self.path.unlink()

    def _replay(self, file: IO[str]) -> None:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        if self._restart:
            lines = []
        if lines:
            try:
                header, *records = map(json.loads, lines)
                found = dict(header["inputs"])
                for record in records:
                    if "stored" in record:
                        self.stored.update(record["stored"])
                        continue
                    values = {int(window): float(value) for window, value in record["kl"].items()}
                    self.measured.setdefault(tuple(map(int, record["widths"])), {}).update(values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(f"{self.path} was altered ({error}); pass --restart to begin anew") from error
            self._check(found)
        # What is kept is rewritten without the line that was cut off, for the next line to begin on a line of its own.
        file.truncate(len("".join(lines).encode()))
        if not lines:
            self._write({"inputs": self._inputs})

    def _check(self, found: Mapping[str, Any]) -> None:
        differing = sorted(key for key in self._inputs.keys() | found.keys() if self._inputs.get(key) != found.get(key))
        if differing:
            changes = "; ".join(f"{key} was {found.get(key)}, is {self._inputs.get(key)}" for key in differing)
            raise InputError(
                f"an unfinished search of {self.path.parent} had other inputs: {changes}. Run that command again to finish it, "
                "or pass --restart to drop what it has measured"
            )

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record) + "\n")
        # A killed process loses nothing that the operating system has.
        self._file.flush()
