"""The pictures of a report. Needs matplotlib, the extra ``plot``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.campaign import TESTED, Run
from loadtests.records import COMPLETED
from loadtests.statistics import Summary
from loadtests.watch import Sample

LATENCIES: dict[str, Callable[[Summary], float | None]] = {
    "time to first token, p90, ms": lambda summary: summary.ttft.p90,
    "inter-token latency, p90, ms": lambda summary: summary.itl.p90,
    "end to end, p90, ms": lambda summary: summary.e2e.p90,
}

COLOURS = {"2": "#c44e52", "3": "#dd8452", "4": "#ccb974", "6": "#55a868", "8": "#4c72b0", "mix": "#666666", "auto": "#111111"}
"""Of precisions, so that a width has one colour in all pictures; others take what is left."""
OTHERS = ("#8172b3", "#937860", "#da8bc3", "#64b5cd")

BINS = 120
"""Bars of a picture over time."""


def draw(runs: Sequence[Run], samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Write the pictures that there is something to draw in; returns their files."""
    drawn = {}
    if any(run.summary.completed for run in runs):
        drawn["latency.png"] = latency_figure(runs)
        drawn["widths.png"] = widths_figure([run for run in runs if run.server == TESTED])
    if len(samples) > 1:
        drawn["soak.png"] = soak_figure(samples)
    for name, figure in drawn.items():
        figure.savefig(folder / name)
    return [folder / name for name in drawn]


def latency_figure(runs: Sequence[Run]) -> Figure:
    """Latency against throughput: a line per precision, a point per rate and concurrency, the median of the repeats."""
    figure = Figure(figsize=(5.2 * len(LATENCIES), 4.4), dpi=120, layout="constrained")
    lines: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        lines.setdefault((run.server, run.cell.precision), []).append(run)
    colours = colours_of([name for _, name in lines])
    for axes, (label, latency) in zip(figure.subplots(1, len(LATENCIES), squeeze=False)[0], LATENCIES.items(), strict=True):
        for (server, name), members in lines.items():
            points = sorted(_points(members, latency))
            marker, line = ("o", "-") if server == TESTED else ("x", "--")
            title = name if server == TESTED else f"{name}, {server}"
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colours[name],
                label=title,
                marker=marker,
                linestyle=line,
            )
        axes.set_xlabel("generated tokens per second")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="precision")
    return figure


def widths_figure(runs: Sequence[Run]) -> Figure:
    """Generated tokens per second over the time of the test, stacked by the precision that they were computed at."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    end = max(run.began_s + record.end_s for run in runs for record in run.records)
    times: dict[str, list[float]] = {}
    for run in runs:
        for record in run.records:
            if record.outcome == COMPLETED:
                first = run.began_s + record.start_s + record.ttft_s
                times.setdefault(record.precision, []).extend(first + np.cumsum([0.0, *record.gaps_s]))
    edges = np.linspace(0, end, BINS + 1)
    names = sorted(times, key=lambda name: (not name.isdigit(), name))
    heights = [np.histogram(times[name], edges)[0] / (end / BINS) for name in names]
    colours = colours_of(names)
    axes.stackplot(
        edges[:-1], heights, labels=names, colors=[colours[name] for name in names], step="post", linewidth=0, baseline="zero"
    )
    _mark_runs(axes, runs, float(np.sum(heights, axis=0).max()))
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds of load")
    axes.set_ylabel("generated tokens per second")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="computed at")
    return figure


def soak_figure(samples: Sequence[Sample]) -> Figure:
    """Memory and load of the server over the time of a soak test."""
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    memory, load = figure.subplots(2, 1, sharex=True)
    times = [sample.time_s for sample in samples]
    memory.plot(times, [sample.memory_bytes / 2**20 for sample in samples], color=COLOURS["8"])
    memory.set_ylabel("resident memory, MiB")
    load.plot(times, [sample.running for sample in samples], color=COLOURS["6"], label="running")
    load.plot(times, [sample.waiting for sample in samples], color=COLOURS["2"], label="waiting")
    load.set_ylabel("requests")
    cache = load.twinx()
    cache.plot(times, [100 * sample.kv_cache for sample in samples], color=COLOURS["mix"], linewidth=0.8, label="KV cache")
    cache.set_ylabel("KV cache in use, %")
    cache.set_ylim(bottom=0)
    load.legend(loc="upper left")
    load.set_xlabel("seconds")
    for axes in (memory, load):
        axes.grid(alpha=0.3)
    return figure


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for every precision."""
    spare = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    return {name: COLOURS.get(name) or next(spare) for name in dict.fromkeys(names)}


def _points(runs: Sequence[Run], latency: Callable[[Summary], float | None]) -> list[tuple[float, float]]:
    cells: dict[Any, list[tuple[float, float]]] = {}
    for run in runs:
        found = latency(run.summary)
        if found is not None:
            cells.setdefault(run.cell, []).append((run.summary.tokens_per_s, found))
    return [(float(np.median([x for x, _ in some])), float(np.median([y for _, y in some]))) for some in cells.values()]


def _mark_runs(axes: Axes, runs: Sequence[Run], top: float) -> None:
    """A line where a run begins, with what it asked for; no names if there are too many to read."""
    for run in runs:
        axes.axvline(run.began_s, color="#00000030", linewidth=0.8)
        if len(runs) <= 16:
            label = f"{run.cell.precision}, {run.cell.rate}/s"
            axes.text(run.began_s, top, label, rotation=90, fontsize=7, va="top", ha="left")
