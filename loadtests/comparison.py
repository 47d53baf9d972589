"""Two servers under the same loads: ratios of their numbers, with confidence intervals over the repeats."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.campaign import AGAINST, TESTED, Cell, Run
from loadtests.statistics import Summary

CONFIDENCE = 0.95
RESAMPLES = 10_000

COMPARED: dict[str, Callable[[Summary], float | None]] = {
    "requests/s": lambda summary: summary.requests_per_s,
    "tokens/s": lambda summary: summary.tokens_per_s,
    "goodput/s": lambda summary: summary.goodput_per_s,
    "TTFT p50": lambda summary: summary.ttft.p50,
    "TTFT p99": lambda summary: summary.ttft.p99,
    "ITL p50": lambda summary: summary.itl.p50,
    "ITL p99": lambda summary: summary.itl.p99,
    "end to end p50": lambda summary: summary.e2e.p50,
    "end to end p99": lambda summary: summary.e2e.p99,
}


@dataclass(frozen=True)
class Ratio:
    """Of one number of one cell: the server under test over the other."""

    cell: Cell
    number: str
    ratio: float
    """Geometric mean over the repeats."""
    low: float | None
    high: float | None
    """Bounds of the confidence interval; None: a single repeat has none."""
    repeats: int


def compare(runs: Sequence[Run]) -> list[Ratio]:
    """Ratios of all cells that both servers have finished; empty if there was one server only."""
    by_server: dict[str, dict[tuple[Cell, int], Summary]] = {TESTED: {}, AGAINST: {}}
    for run in runs:
        if not run.partial:
            by_server[run.server][run.cell, run.repeat] = run.summary
    cells = dict.fromkeys(cell for cell, _ in by_server[TESTED])
    found = []
    for cell in cells:
        repeats = [key for key in by_server[TESTED] if key[0] == cell and key in by_server[AGAINST]]
        for name, number in COMPARED.items():
            pairs = [(number(by_server[TESTED][key]), number(by_server[AGAINST][key])) for key in repeats]
            ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
            if ratios:
                found.append(Ratio(cell, name, *geometric_mean(ratios), len(ratios)))
    return found


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the bounds of its percentile bootstrap interval, resampling the repeats; no bounds of a single one."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    if len(logs) == 1:
        return math.exp(logs[0]), None, None
    # Seeded: the same repeats give the same interval.
    samples = np.random.default_rng(0).choice(logs, size=(RESAMPLES, len(logs))).mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, (tail, 1 - tail))
    return math.exp(logs.mean()), math.exp(low), math.exp(high)
