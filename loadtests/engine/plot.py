"""Milliseconds per decode step against the batch, as a picture. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.engine.report import batches, rows
from loadtests.engine.variants import OURS


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: a line per row, ours solid, peers dashed; both axes logarithmic."""
    from matplotlib.figure import Figure

    found = rows(results)
    figure = Figure(figsize=(8.0, 5.0), dpi=110)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    for (name, row), marker in zip(found.items(), "ov^<>sPXD*hp+x1234", strict=False):
        times = {int(batch): time for batch, time in row["decode_ms"].items()}
        style = "-" if name.startswith(OURS) else "--"
        axes.plot(list(times), list(times.values()), style, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches(found), [str(batch) for batch in batches(found)])
    axes.set_xlabel("requests in the batch")
    axes.set_ylabel("ms per decode step")
    axes.set_title(str(results[0]["device"]))
    axes.grid(True, which="both", color="0.9")
    axes.legend(frameon=False)
    figure.savefig(path)
