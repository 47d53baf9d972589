"""What a search found: one row per profile, as a table, and as JSON values."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matgptq_vllm.core.precision import uniform_width


@dataclass(frozen=True)
class HeldOut:
    """Quality on text that was not searched on."""

    kl: float
    """Mean KL divergence from the original, in nats per token."""

    perplexity: float


@dataclass(frozen=True)
class Row:
    """One profile: a found one, or a uniform one to compare with."""

    name: str
    bits_per_weight: float
    weight_bytes: int
    """Of the quantized layers, scales included."""

    search_kl: float
    """As ``HeldOut.kl``, on the windows searched on."""

    held_out: HeldOut | None = None
    cost: str | None = None
    """What a found profile costs, in the currency of its budget."""

    generations: int | None = None
    """Generations that the search of a found profile took."""


@dataclass(frozen=True)
class Report:
    """The result of one run of search."""

    model: str
    original: str
    original_perplexity: float | None
    """On the held-out text."""

    rows: tuple[Row, ...]
    """By bits per weight, ascending."""

    widths: dict[str, dict[str, int]]
    """Found profile -> layer -> width."""


def as_json_values(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    return asdict(report)


def as_table(report: Report) -> str:
    """The report for a terminal or a Markdown page: a table, then what each found profile gains."""
    held_out = any(row.held_out for row in report.rows)
    header = ["profile", "bits/weight", "weights MiB", "KL, search text"]
    header += ["KL, held out", "perplexity, held out"] if held_out else []
    cells = [header, ["---:"] * len(header)]
    for row in report.rows:
        line = [row.name, f"{row.bits_per_weight:.3f}", f"{row.weight_bytes / 2**20:.2f}", f"{row.search_kl:.5f}"]
        if row.held_out:
            line += [f"{row.held_out.kl:.5f}", f"{row.held_out.perplexity:.3f}"]
        cells.append(line)
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    if report.original_perplexity is not None:
        lines += ["", f"perplexity of the original, held out: {report.original_perplexity:.3f}"]
    lines += ["", *(_verdict(row, report.rows) for row in report.rows if row.cost is not None)]
    return "\n".join(lines)


def line_between(row: Row, rows: Iterable[Row]) -> Row | None:
    """A row on the straight line between the uniform neighbours of ``row``, at its bits per weight.

    The neighbours are the nearest uniform profiles at most and at least as wide. None if one is not among ``rows``.
    """
    uniform = [other for other in rows if uniform_width(other.name) is not None]
    below = max((o for o in uniform if o.bits_per_weight <= row.bits_per_weight), key=_bits, default=None)
    above = min((o for o in uniform if o.bits_per_weight >= row.bits_per_weight), key=_bits, default=None)
    if below is None or above is None:
        return None
    span = above.bits_per_weight - below.bits_per_weight
    share = (row.bits_per_weight - below.bits_per_weight) / span if span else 0.0

    def mixed(low: float, high: float) -> float:
        return low + share * (high - low)

    held_out = None
    if below.held_out and above.held_out:
        held_out = HeldOut(
            mixed(below.held_out.kl, above.held_out.kl), mixed(below.held_out.perplexity, above.held_out.perplexity)
        )
    name = below.name if not span else f"the line from {below.name} to {above.name}"
    weight_bytes = round(mixed(below.weight_bytes, above.weight_bytes))
    return Row(name, row.bits_per_weight, weight_bytes, mixed(below.search_kl, above.search_kl), held_out)


def _bits(row: Row) -> float:
    return row.bits_per_weight


def _verdict(row: Row, rows: Sequence[Row]) -> str:
    line = line_between(row, rows)
    text = f"{row.name} ({row.cost}, {row.generations} generations)"
    if line is None:
        return text
    text += f": against {line.name}, KL on the search text {_change(row.search_kl, line.search_kl)}"
    if row.held_out and line.held_out:
        text += f", held out {_change(row.held_out.kl, line.held_out.kl)}"
        text += f", perplexity {_change(row.held_out.perplexity, line.held_out.perplexity)}"
    return text


def _change(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.1%}"
