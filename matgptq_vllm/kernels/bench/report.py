"""A run's tables, for a terminal and as Markdown."""

from collections.abc import Callable, Sequence

from matgptq_vllm.kernels.bench.competitors import ALL, Competitor
from matgptq_vllm.kernels.bench.ratios import Ratio, ratio
from matgptq_vllm.kernels.bench.results import Results, Sums, layer_sums
from matgptq_vllm.kernels.bench.shapes import MODELS, GemmShape

NOTHING = "-"

Row = Sequence[str]


def as_text(results: Results) -> str:
    """Aligned tables of every model: layer sums, ratios, bandwidth; and what could not be measured."""
    parts = [_setting(results)]
    for model in results.models:
        for title, rows in model_tables(results, model, MODELS[model]):
            parts.append(f"{title}\n{aligned(rows)}")
    return "\n\n".join([*parts, *_failures(results)])


def as_markdown(results: Results, plots: dict[str, str]) -> str:
    """A Markdown page, with every layer's own times.

    Args:
        plots: file name of each model's plot, where there is one.
    """
    parts = ["# Matrix products of sliced layers", _setting(results)]
    for model in results.models:
        shapes = MODELS[model]
        parts.append(f"## {model}")
        if model in plots:
            parts.append(f"![Time against M]({plots[model]})")
        for title, rows in model_tables(results, model, shapes):
            parts += [f"### {title}", markdown_table(rows)]
        for shape in shapes:
            rows = layer_rows(results, model, shape)
            if len(rows) > 1:
                parts += [f"### {model} {shape.layer}, {shape.n} x {shape.k}: µs, median (least to most)", markdown_table(rows)]
    failures = _failures(results)
    if failures:
        parts += ["## Not measured", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join(parts) + "\n"


def model_tables(results: Results, model: str, shapes: Sequence[GemmShape]) -> list[tuple[str, list[Row]]]:
    """(title, rows with a header) of a model's tables; tables without content are left out."""
    times, read = layer_sums(results, model, [shape.layer for shape in shapes])
    tables = [
        (f"{model}: µs, sum of {', '.join(shape.layer for shape in shapes)}", time_rows(results, times)),
        (f"{model}: times faster than the best peer (x), or time over the best peer's (/)", ratio_rows(results, times)),
        (f"{model}: weight bytes per second, % of a measured copy{_of_datasheet(results)}", rate_rows(results, times, read)),
    ]
    return [(title, rows) for title, rows in tables if len(rows) > 1]


def time_rows(results: Results, times: Sums) -> list[Row]:
    """Microseconds of all layers together."""
    return _rows(results, lambda competitor, m: f"{times[competitor.key, m]:.1f}" if (competitor.key, m) in times else None)


def ratio_rows(results: Results, times: Sums) -> list[Row]:
    """Ours against the competition."""

    def cell(competitor: Competitor, m: int) -> str | None:
        found = ratio(competitor, m, times) if competitor.is_ours else None
        return None if found is None else ratio_text(found)

    return _rows(results, cell)


def ratio_text(found: Ratio) -> str:
    """A ratio, its kind and how it stands to its target: ``1.43x met``, ``/1.12 (1.05)`` where 1.05 is exceeded."""
    value = f"{found.value:.2f}x" if found.is_speedup else f"/{found.value:.2f}"
    if found.is_met is None:
        return value
    return f"{value} met" if found.is_met else f"{value} ({found.target:.2f})"


def rate_rows(results: Results, times: Sums, read: Sums) -> list[Row]:
    """Weight bytes read per second, as a fraction of the device's memory bandwidth."""
    device = results.device

    def cell(competitor: Competitor, m: int) -> str | None:
        if (competitor.key, m) not in times:
            return None
        rate = 1e6 * read[competitor.key, m] / times[competitor.key, m]
        stated = device.datasheet_bytes_per_s
        return f"{100 * rate / device.copy_bytes_per_s:.0f}%" + (f" ({100 * rate / stated:.0f}%)" if stated else "")

    return _rows(results, cell)


def layer_rows(results: Results, model: str, shape: GemmShape) -> list[Row]:
    """Microseconds of one layer, with their spread."""
    cells = {(c.competitor, c.m): c for c in results.cells if (c.model, c.layer) == (model, shape.layer)}

    def cell(competitor: Competitor, m: int) -> str | None:
        found = cells.get((competitor.key, m))
        return None if found is None else f"{found.us:.1f} ({found.low_us:.1f} to {found.high_us:.1f})"

    return _rows(results, cell)


def aligned(rows: Sequence[Row]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table; the first row is the header."""
    header, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body])


def _rows(results: Results, cell: Callable[[Competitor, int], str | None]) -> list[Row]:
    """A header and a row per competitor that has any cell, each the text of ``cell(competitor, M)``."""
    rows: list[Row] = [["M =", *map(str, results.ms)]]
    for competitor in ALL:
        if competitor.key in results.competitors:
            cells = [cell(competitor, m) for m in results.ms]
            if any(cells):
                rows.append([competitor.label, *(text or NOTHING for text in cells)])
    return rows


def _setting(results: Results) -> str:
    device = results.device
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    group = "one scale per channel" if results.group_size == -1 else f"group size {results.group_size}"
    return (
        f"{device.name}, {versions}; bfloat16 activations, {group}, rule {results.rule}; a device-to-device copy moves "
        f"{device.copy_bytes_per_s / 1e12:.2f} TB/s, bytes read and written together."
    )


def _of_datasheet(results: Results) -> str:
    stated = results.device.datasheet_bytes_per_s
    return f" (and of the {stated / 1e12:g} TB/s of the data sheet)" if stated else ""


def _failures(results: Results) -> list[str]:
    """A line per layer and reason: time that runs out leaves out all that was to come."""
    labels = {competitor.key: competitor.label for competitor in ALL}
    found: dict[tuple[str, str, str], list[str]] = {}
    for failure in results.failures:
        what = f"{labels[failure.competitor]}{'' if failure.m is None else f' at M = {failure.m}'}"
        found.setdefault((failure.model, failure.layer, failure.reason), []).append(what)
    return [f"{model} {layer}: {', '.join(what)} not available: {reason}" for (model, layer, reason), what in found.items()]
