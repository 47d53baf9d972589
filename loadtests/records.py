"""What became of each request: one line of JSON per request, kept beside the report."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

COMPLETED, FAILED, CANCELLED, REFUSED, INTERRUPTED = "completed", "failed", "cancelled", "refused", "interrupted"
"""Outcomes. Cancelled: by its client, on purpose. Refused: malformed on purpose, and answered with 400 to 499. Interrupted:
the load test was stopped while it ran."""


@dataclass(frozen=True)
class Record:
    """One request. Times are in seconds from the start of the run."""

    number: int
    asked: str
    """Precision asked for."""
    given: str | None
    """Precision that the answer names; None: it names none."""
    outcome: str
    status: int | None
    """Of HTTP; None: no answer came."""
    due_s: float
    start_s: float
    """When it was sent: later than it was due if the bound on concurrency was reached."""
    ttft_s: float
    """From sending to the first token; 0: none came."""
    gaps_s: tuple[float, ...]
    """Between one piece of the answer and the next."""
    end_s: float
    input_tokens: int
    output_tokens: int
    error: str = ""

    @property
    def precision(self) -> str:
        """What it was computed at, as far as is known."""
        return self.given or self.asked

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for an answer of one token."""
        return sum(self.gaps_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def write_records(records: Iterable[Record], path: Path) -> None:
    """One line per request."""
    lines = (json.dumps(asdict(record)) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """What ``write_records`` wrote; a file that ends in ``.gz`` was compressed afterwards."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    entries = (json.loads(line) for line in content.decode("utf-8").splitlines())
    return [Record(**{**entry, "gaps_s": tuple(entry["gaps_s"])}) for entry in entries]
