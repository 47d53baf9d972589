"""Quality against average bits, as a picture. Needs matplotlib, the extra ``plot``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calibrate.evaluate.report import Report, Result
from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.precision import uniform_width

UNIFORM_COLOUR = "#1f5f99"
MIXED_COLOUR = "#d1602c"
LABEL_LIMIT = 16
"""More mixed profiles than this are drawn without names."""


def check_plotting() -> None:
    """UnsupportedError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            'the plot of --out needs matplotlib, which is not installed: pip install "matgptq-vllm[plot]". '
            "Or leave --out out and pass --json"
        ) from error


def draw(report: Report, path: Path) -> None:
    """Write the figure of ``report`` as a PNG."""
    make_figure(report).savefig(path)


def make_figure(report: Report) -> Any:
    """A matplotlib figure: perplexity increase and KL against bits per weight; perplexity alone without an original.

    Uniform widths are points on a line, mixed profiles points of their own; both carry their names.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels: list[tuple[str, Callable[[Result], float]]]
    if report.original is None:
        panels = [("perplexity", lambda result: result.perplexity)]
    else:
        panels = [
            ("perplexity increase over the original, %", lambda result: 100 * _known(result.increase)),
            ("KL(original || slice), nats per token", lambda result: _known(result.kl)),
        ]
    figure = Figure(figsize=(6.0 * len(panels), 4.6), dpi=130)
    figure.set_layout_engine("constrained", wspace=0.06)
    figure.suptitle(f"{Path(report.model).name} on {Path(report.text or '').name}, {report.tokens:,} tokens")
    for axes, (label, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, report.results, value)
        axes.set_ylabel(label)
        plain = FuncFormatter(lambda height, _: f"{height:g}")
        axes.yaxis.set_major_formatter(plain)
        # Within one decade, the ticks between the powers of ten are all there is to read.
        axes.yaxis.set_minor_formatter(NullFormatter() if len(axes.yaxis.get_majorticklocs()) > 3 else plain)
    return figure


def _panel(axes: Any, results: Sequence[Result], value: Callable[[Result], float]) -> None:
    uniform = sorted((r for r in results if uniform_width(r.precision) is not None), key=lambda r: r.bits_per_weight)
    mixed = [r for r in results if uniform_width(r.precision) is None]
    for group, colour, style, name in (
        (uniform, UNIFORM_COLOUR, "o-", "uniform width"),
        (mixed, MIXED_COLOUR, "D", "mixed profile"),
    ):
        if group:
            bits, heights = [r.bits_per_weight for r in group], [value(r) for r in group]
            axes.plot(bits, heights, style, color=colour, label=name, markersize=6, zorder=3)
    _scale(axes, [value(r) for r in results])
    axes.grid(True, which="major", color="0.85")
    axes.set_xlabel("bits per weight, average")
    axes.set_xlim(1.5, 8.6)
    axes.set_xticks(range(2, 9))
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if mixed:
        axes.legend(frameon=False)
    for result in uniform:
        _name(axes, result, value, offset=(5, 6), colour=UNIFORM_COLOUR)
    for result in mixed if len(mixed) <= LABEL_LIMIT else []:
        # Below and to the left: the line of uniform widths lies above a mixed profile worth having.
        _name(axes, result, value, offset=(-5, -11), colour=MIXED_COLOUR, align="right")


def _scale(axes: Any, heights: Sequence[float]) -> None:
    """Logarithmic, which fits what quantization costs; linear near 0 if a slice is no worse than the original."""
    if min(heights) > 0:
        axes.set_yscale("log")
        return
    above = [height for height in heights if height > 0]
    axes.set_yscale("symlog", linthresh=min(above) if above else 1.0)
    axes.axhline(0, color="0.6", linewidth=0.8)


def _name(
    axes: Any, result: Result, value: Callable[[Result], float], offset: tuple[int, int], colour: str, align: str = "left"
) -> None:
    axes.annotate(
        result.precision,
        (result.bits_per_weight, value(result)),
        xytext=offset,
        textcoords="offset points",
        ha=align,
        color=colour,
        fontsize=9,
    )


def _known(value: float | None) -> float:
    assert value is not None  # with an original every result has every measurement
    return value
