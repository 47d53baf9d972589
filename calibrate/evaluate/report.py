"""What an evaluation found: records, and the same as JSON, as tables for a terminal and as Markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

PLOT_FILE = "quality.png"

Row = Sequence[str]


@dataclass(frozen=True)
class Result:
    """Quality and size of one model at one precision."""

    precision: str
    """Profile name; the type of the weights for a model that is not a parent."""
    bits_per_weight: float
    """Mean code bits read per weight of the quantized layers; bits of the type for a plain model."""
    weight_bytes: int
    """Bytes of those layers, scales included."""
    perplexity: float
    increase: float | None = None
    """Perplexity over the original's, minus 1."""
    kl: float | None = None
    """Mean over scored tokens of KL(original || this), in nats."""
    top1_agreement: float | None = None
    """Share of scored tokens whose most likely successor is the original's."""


@dataclass(frozen=True)
class TaskResult:
    """One metric of one lm-eval task at one precision."""

    precision: str
    task: str
    metric: str
    """The harness's name, with its filter after a comma unless that is ``none``."""
    value: float
    stderr: float | None
    """Standard error of ``value``; None where the harness has none."""
    examples: int


@dataclass(frozen=True)
class Report:
    """One evaluation."""

    model: str
    text: str | None = None
    """What was measured on; None if only tasks were run."""
    seq_len: int | None = None
    """Tokens per window."""
    tokens: int | None = None
    """Scored tokens."""
    original_model: str | None = None
    original: Result | None = None
    """The original's own row."""
    results: Sequence[Result] = ()
    """One per profile, narrow to wide, then the profiles of the table."""
    url: str | None = None
    """The server that ran the tasks; None if the harness ran the model itself."""
    tasks: Sequence[TaskResult] = ()
    notes: Sequence[str] = ()
    """What was left out, and why."""


def as_json(report: Report) -> str:
    """The report as a JSON object with the fields of ``Report``."""
    return json.dumps(asdict(report), indent=1)


def as_text(report: Report) -> str:
    """Aligned tables for a terminal, and the notes."""
    parts = [_aligned(rows) for rows in (quality_rows(report), task_rows(report)) if rows]
    return "\n\n".join([*parts, *(f"note: {note}" for note in report.notes)])


def as_markdown(report: Report, plot: bool) -> str:
    """A Markdown page; ``plot`` if PLOT_FILE lies beside it."""
    parts = [f"# Quality of `{report.model}`"]
    if report.results:
        parts += [quality_section(report)]
        if plot:
            parts += [f"![Quality against bits per weight]({PLOT_FILE})"]
    if report.tasks:
        through = f"the server at {report.url}" if report.url else "the harness directly"
        parts += ["## Tasks", f"lm-eval, through {through}; ± is one standard error.", markdown_table(task_rows(report))]
    parts += [f"Note: {note}." for note in report.notes]
    return "\n\n".join(parts) + "\n"


def quality_section(report: Report) -> str:
    """What was measured on the text, as Markdown: one sentence, the table, and what its columns mean."""
    against = f", compared with `{report.original_model}`" if report.original_model else ""
    parts = [
        f"{report.tokens:,} scored tokens of `{report.text}` in windows of {report.seq_len}{against}.",
        markdown_table(quality_rows(report)),
    ]
    if report.original is not None:
        parts += [
            "KL is the mean of KL(original || slice) per scored token; top-1 is the share of tokens whose most likely "
            "successor is the original's."
        ]
    return "\n\n".join(parts)


def quality_rows(report: Report) -> list[Row]:
    """Header and one row per precision, the original first; columns that nothing has are left out."""
    results = [*([report.original] if report.original else []), *report.results]
    if not results:
        return []
    columns = [
        ("precision", [result.precision for result in results]),
        ("bits/weight", [f"{result.bits_per_weight:.2f}" for result in results]),
        ("weights MiB", [f"{result.weight_bytes / 2**20:.2f}" for result in results]),
        ("perplexity", [f"{result.perplexity:.3f}" for result in results]),
    ]
    if report.original is not None:
        columns += [
            ("increase", ["" if result.increase is None else f"{result.increase:+.2%}" for result in results]),
            ("KL, nats", ["" if result.kl is None else f"{result.kl:.5f}" for result in results]),
            ("top-1", ["" if result.top1_agreement is None else f"{result.top1_agreement:.2%}" for result in results]),
        ]
    return [[name for name, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]


def task_rows(report: Report) -> list[Row]:
    """Header and one row per task and metric, one column per precision."""
    if not report.tasks:
        return []
    precisions = list(dict.fromkeys(result.precision for result in report.tasks))
    cells = {(result.task, result.metric, result.precision): _value(result) for result in report.tasks}
    rows: list[Row] = [["task", "metric", *precisions]]
    for task, metric in dict.fromkeys((result.task, result.metric) for result in report.tasks):
        rows.append([task, metric, *(cells.get((task, metric, precision), "") for precision in precisions)])
    return rows


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table of a header and rows."""
    lines = [rows[0], ["---:"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _aligned(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _value(result: TaskResult) -> str:
    return f"{result.value:.4g}" + ("" if result.stderr is None else f" ± {result.stderr:.2g}")
