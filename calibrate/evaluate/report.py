"""Results of an evaluation: one record per precision; as a table, as Markdown, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Result:
    """Quality and size of one model at one precision."""

    model: str
    precision: str
    """Profile name; the type of the weights for a model that is not a parent."""
    perplexity: float
    tokens: int
    """Scored tokens."""
    seq_len: int
    bits_per_weight: float
    """Mean code bits read per weight of the quantized layers; bits of the type for a plain model."""
    weight_bytes: int
    """Bytes of those layers, scales included."""


COLUMNS = ("precision", "bits/weight", "weights MiB", "perplexity")


def as_json(results: Sequence[Result], single: bool) -> str:
    """A list of records, or the record itself where one precision was asked for."""
    records = [asdict(result) for result in results]
    return json.dumps(records[0] if single else records, indent=1)


def as_table(results: Sequence[Result]) -> str:
    """Aligned columns for a terminal."""
    rows = [COLUMNS, *map(_cells, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def as_markdown(results: Sequence[Result]) -> str:
    """A Markdown table."""
    lines = [COLUMNS, ("---:",) * len(COLUMNS), *map(_cells, results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.precision,
        f"{result.bits_per_weight:.2f}",
        f"{result.weight_bytes / 2**20:.2f}",
        f"{result.perplexity:.3f}",
    )
