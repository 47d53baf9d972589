"""The search for the fastest configurations. What it asks of a GPU is ``Machine``, so that it can be followed without one."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.tables import SEVERAL, Table, bucket
from matgptq_vllm.kernels.tune.candidates import KEPT, first_round, second_round
from matgptq_vllm.kernels.tune.options import TuneOptions
from matgptq_vllm.kernels.tuning import Hardware, Problem, pick

DENSE_MS = (128, 192, 256, 384, 512, 768, 1024)
"""M at which the fused and the dense path are compared."""

COMPILING, FIRST_TIMING, LAST_COMPILING, LAST_TIMING = 0.45, 0.6, 0.85, 0.95
"""Of a shape's time, what has passed at most when each stage ends; the rest is for the dense path."""


class Layer(Protocol):
    """One layer on the GPU (``layer.RandomLayer``)."""

    def fused(self, problem: Problem, configs: Sequence[Config], seconds: float) -> dict[Config, float]: ...

    def crossing(self, problem: Problem, config: Config, m: int, seconds: float) -> tuple[float, float]: ...


class Machine(Protocol):
    """A GPU."""

    hardware: Hardware
    by_rule: bool
    """Whether products of few rows follow rules instead of tables (kernels.small, kernels.wide): then nothing is searched for
    but from how many rows on the dense path is faster."""

    def compile(self, wanted: Iterable[tuple[Problem, Config]], until: float) -> set[tuple[Problem, Config]]: ...

    def layer(self, n: int, k: int, group_size: int, narrowest: int, largest_m: int) -> Layer: ...


@dataclass(frozen=True)
class Gain:
    """What was found for one entry of the table."""

    problem: Problem
    before_us: float | None
    """With the configuration that was in use until now; None if it was not among those that ran in time."""
    us: float


@dataclass(frozen=True)
class Found:
    """Of one shape."""

    table: Table
    gains: list[Gain]
    missing: int
    """Entries for which no configuration could be timed in the seconds allowed."""


@dataclass(frozen=True)
class _Share:
    """The time that a shape may take."""

    start: float
    seconds: float

    def until(self, part: float) -> float:
        """The time at which so much of it will have passed."""
        return self.start + part * self.seconds


def search(
    options: TuneOptions,
    known: Table,
    machine: Machine,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Found]:
    """The fastest configurations of every shape, a shape at a time, within ``options.seconds``.

    Args:
        known: what is in use now.
        say: gets lines of progress.
    """
    deadline = clock() + options.seconds
    for index, (n, k) in enumerate(options.shapes):
        start = clock()
        share = (deadline - start) / (len(options.shapes) - index)
        if share > 0:
            say(f"{n}x{k}: {share:.0f} s")
            found = _shape(options, n, k, known, machine, _Share(start, share), clock)
            yield found
            say(f"{n}x{k}: {len(found.gains)} entries in {clock() - start:.0f} s")
        else:
            yield Found(Table(), [], 1 if machine.by_rule else len(options.widths) * len(options.ms))


def problems(options: TuneOptions, n: int, k: int) -> list[Problem]:
    """One per entry of the table that a shape gets."""
    return [
        Problem(m, n, k, WIDTHS if name == SEVERAL else (int(name),), options.group_size)
        for name in options.widths
        for m in options.ms
    ]


def _shape(
    options: TuneOptions,
    n: int,
    k: int,
    known: Table,
    machine: Machine,
    share: _Share,
    clock: Callable[[], float],
) -> Found:
    if machine.by_rule:
        problem = Problem(DENSE_MS[0], n, k, WIDTHS, options.group_size)
        layer = machine.layer(n, k, options.group_size, WIDTHS[0], DENSE_MS[-1])
        rows = _dense_from(layer, problem, known, machine.hardware, share.until(1.0), clock)
        return Found(Table({}, {(n, k): rows}), [], 0)
    entries = problems(options, n, k)
    before = {problem: pick(problem, machine.hardware, known) for problem in entries}
    wanted = {problem: first_round(problem, machine.hardware, before[problem]) for problem in entries}
    compiled = machine.compile(_pairs(wanted), share.until(COMPILING))
    narrowest = min(min(problem.widths) for problem in entries)
    layer = machine.layer(n, k, options.group_size, narrowest, max(*options.ms, *DENSE_MS))
    times = _timed(layer, _kept(wanted, compiled), share.until(FIRST_TIMING), clock)
    fastest = {problem: sorted(us, key=us.__getitem__)[:KEPT] for problem, us in times.items()}
    # All that may be taken is timed again, in the same rounds as its rivals.
    wanted = {
        problem: list(dict.fromkeys([before[problem], *best, *second_round(problem, machine.hardware, best)]))
        for problem, best in fastest.items()
    }
    compiled = machine.compile(_pairs(wanted), share.until(LAST_COMPILING))
    times |= _timed(layer, _kept(wanted, compiled), share.until(LAST_TIMING), clock)
    best = {problem: min(us, key=us.__getitem__) for problem, us in times.items()}
    table = Table({problem.key: config for problem, config in best.items()})
    gains = [Gain(problem, us.get(before[problem]), us[best[problem]]) for problem, us in times.items()]
    if best:
        table.dense_from[n, k] = _dense_from(layer, entries[0], table, machine.hardware, share.until(1.0), clock)
    return Found(table, gains, len(entries) - len(best))


def _timed(
    layer: Layer, wanted: dict[Problem, list[Config]], until: float, clock: Callable[[], float]
) -> dict[Problem, dict[Config, float]]:
    """Microseconds of every configuration; products that came too late, or have none that ran, are left out."""
    times = {}
    for index, (problem, configs) in enumerate(wanted.items()):
        seconds = (until - clock()) / (len(wanted) - index)
        if configs and seconds > 0 and (found := layer.fused(problem, configs, seconds)):
            times[problem] = found
    return times


def _dense_from(
    layer: Layer, problem: Problem, table: Table, hardware: Hardware, until: float, clock: Callable[[], float]
) -> int:
    """The least of DENSE_MS from which on the dense path is faster; twice the last if it never is."""
    least = 2 * DENSE_MS[-1]
    for index, m in enumerate(reversed(DENSE_MS)):
        at_m = replace(problem, bucket=bucket(m))
        seconds = max((until - clock()) / (len(DENSE_MS) - index), 0.0)
        fused, dense = layer.crossing(at_m, pick(at_m, hardware, table), m, seconds)
        if dense >= fused:
            break
        least = m
    return least


def _pairs(wanted: dict[Problem, list[Config]]) -> list[tuple[Problem, Config]]:
    return [(problem, config) for problem, configs in wanted.items() for config in configs]


def _kept(wanted: dict[Problem, list[Config]], compiled: set[tuple[Problem, Config]]) -> dict[Problem, list[Config]]:
    return {problem: [config for config in configs if (problem, config) in compiled] for problem, configs in wanted.items()}
