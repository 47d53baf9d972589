"""Time against M as a picture. Needs matplotlib, the extra ``plot``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.kernels.bench.competitors import ALL, Competitor
from matgptq_vllm.kernels.bench.results import Results, layer_sums
from matgptq_vllm.kernels.bench.shapes import MODELS

BLUE, SKY, GREEN, ORANGE, VERMILION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
"""Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes carry the same information."""

WIDTH_STYLES = {8: (BLUE, "o"), 6: (SKY, "s"), 4: (GREEN, "^"), 3: (ORANGE, "D"), 2: (VERMILION, "v")}
PEER_STYLES = {
    "bf16": ("black", "x", "-"),
    "marlin-w4": ("0.35", "^", "--"),
    "machete-w4": ("0.35", "<", ":"),
    "marlin-w8": ("0.6", "o", "--"),
    "machete-w8": ("0.6", "p", ":"),
}


def check_plotting() -> None:
    """UnsupportedError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            'the plot needs matplotlib, which is not installed: pip install "matgptq-vllm[plot]". Or pass --no-plot'
        ) from error


def draw(results: Results, model: str, path: Path) -> None:
    """Write the figure of ``model`` as a PNG."""
    make_figure(results, model).savefig(path)


def make_figure(results: Results, model: str) -> Any:
    """A matplotlib figure: microseconds of all layers of ``model`` against M, a line per competitor, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    times, _ = layer_sums(results, model, [shape.layer for shape in MODELS[model]])
    figure = Figure(figsize=(9.0, 5.4), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    for competitor in ALL:
        ms = [m for m in results.ms if (competitor.key, m) in times]
        if ms:
            colour, marker, dashes = _style(competitor)
            heights = [times[competitor.key, m] for m in ms]
            # Ours are on top: where lines meet, they are the ones that a reader looks for.
            front = 3 if competitor.is_ours else 2
            axes.plot(ms, heights, dashes, color=colour, marker=marker, markersize=5, label=competitor.label, zorder=front)
    axes.set_title(f"{model} on {results.device.name}: linear layers of one block, rule {results.rule}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(_apart(results.ms))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{m:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("M, tokens in the batch")
    axes.set_ylabel("time, µs")
    axes.grid(True, which="major", color="0.88")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        figure.legend(loc="outside right center", frameon=False)
    return figure


def _style(competitor: Competitor) -> tuple[str, str, str]:
    """Colour, marker and dashes."""
    if competitor.family == "mixed":
        return PURPLE, "P", "-"
    if competitor.is_ours:
        colour, marker = WIDTH_STYLES[competitor.widths[0]]
        return colour, marker, "-" if competitor.family == "width" else "-."
    return PEER_STYLES[competitor.key]


def _apart(ms: Sequence[int]) -> list[int]:
    """Those of ``ms`` whose labels have room on a logarithmic axis."""
    kept: list[int] = []
    for m in sorted(ms):
        if not kept or m >= 1.5 * kept[-1]:
            kept.append(m)
    return kept
