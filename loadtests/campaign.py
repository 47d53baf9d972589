"""All runs of a load test, one after the other, and what is known when it is interrupted."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from loadtests.generator import Target, put_load
from loadtests.options import LoadTestOptions, Rate
from loadtests.records import Record, write_records
from loadtests.server import AUTO, DEFAULT, MIX, Server
from loadtests.statistics import Summary, by_precision, duration_s, summarize
from loadtests.workload import Planned
from matgptq_vllm.core.errors import InputError

TESTED, AGAINST = "tested", "against"
"""Names of the two servers in reports."""


@dataclass(frozen=True)
class Cell:
    """What is varied."""

    precision: str
    rate: Rate
    concurrency: int

    def __str__(self) -> str:
        return f"{self.precision} at {self.rate}/s, {self.concurrency} in flight"


@dataclass(frozen=True)
class Run:
    """One load on one server, and its numbers."""

    server: str
    """TESTED or AGAINST."""
    cell: Cell
    repeat: int
    rate_per_s: float
    """As sent; differs from the cell's if that is a share of the capacity."""
    partial: bool
    """Interrupted before its end."""
    summary: Summary
    parts: dict[str, Summary]
    """By the precision that requests were computed at."""
    began_s: float
    """Seconds since the first run began."""
    clock_s: float
    """Monotonic clock when it began."""
    records: list[Record] = field(repr=False)


@dataclass(frozen=True)
class Campaign:
    """The servers and the runs of a load test; runs are added as they end.

    Args:
        options: what to do.
        servers: TESTED, and AGAINST if there are two.
        tokenizer: folder with the model's tokenizer.
    """

    options: LoadTestOptions
    servers: dict[str, Server]
    tokenizer: str
    runs: list[Run] = field(default_factory=list)

    def run(self) -> None:
        """Do all runs.

        Raises:
            KeyboardInterrupt: the user stopped it; the run in progress is added with what it had.
        """
        steps = list(self._steps())
        raw = self.options.out / "runs"
        raw.mkdir(parents=True, exist_ok=True)
        visible = sys.stderr.isatty()
        with tqdm(total=len(steps), desc="runs", unit="run", disable=not visible) as bar:
            for number, (cell, repeat, server) in enumerate(steps):
                bar.set_postfix_str(f"{server} {cell}")
                self._one(number, cell, repeat, server, raw / f"{number:03d}.jsonl", visible)
                bar.update(1)
                if not visible:
                    done = self.runs[-1].summary
                    note = f"{done.tokens_per_s:.1f} tokens/s, {done.failed} failed"
                    print(f"[{number + 1}/{len(steps)}] {server} {cell}: {note}", file=sys.stderr, flush=True)

    def _steps(self) -> Iterator[tuple[Cell, int, str]]:
        options = self.options
        # A share of the capacity needs the capacity first.
        shares = any(rate.of_capacity for rate in options.rates)
        rates = dict.fromkeys([*([Rate(math.inf)] if shares else []), *options.rates])
        for repeat in range(options.repeats):
            for precision in options.precisions:
                for concurrency in options.concurrency:
                    for rate in rates:
                        # In turn, and each first as often as the other: what warms up or wears out favours neither.
                        names = list(self.servers)[:: -1 if repeat % 2 else 1]
                        for name in names:
                            yield Cell(precision, rate, concurrency), repeat, name

    def _one(self, number: int, cell: Cell, repeat: int, name: str, file: Path, visible: bool) -> None:
        server = self.servers[name]
        rate = self._rate(cell, repeat)
        # Both servers of a comparison get the same prompts.
        plan = self.plan(cell, rate, number // len(self.servers))
        records: list[Record] = []
        began = max((run.began_s + record.end_s for run in self.runs for record in run.records), default=0.0)
        target = Target(server, self.tokenizer, self.options.headers if cell.precision == AUTO else {})
        finished, clock = False, time.monotonic()
        try:
            trace = file.with_suffix(".trace")
            put_load(target, plan, cell.concurrency, self.options.warmups, trace, visible, records)
            finished = True
        finally:
            write_records(records, file)
            length, slo, bits = duration_s(records), self.options.objectives, self.servers[TESTED].bits
            summary = summarize(records, slo, bits, length)
            groups = by_precision(records)
            parts = {one: summarize(group, slo, bits, length) for one, group in groups.items()}
            self.runs.append(Run(name, cell, repeat, rate, not finished, summary, parts, began, clock, records))

    def plan(self, cell: Cell, rate: float, number: int) -> list[Planned]:
        """The requests of a run."""
        server = self.servers[TESTED]
        named = [name for name in self.options.precisions if name not in (MIX, AUTO, DEFAULT)]
        mixed = (named or server.uniform()) if cell.precision == MIX else [cell.precision]
        longest = [one.longest for one in self.servers.values() if one.longest is not None]
        return self.options.workload.plan(rate, cell.concurrency, mixed, number, min(longest, default=None))

    def _rate(self, cell: Cell, repeat: int) -> float:
        if not cell.rate.of_capacity:
            return cell.rate.value
        capacity = [
            run.summary.requests_per_s
            for run in self.runs
            if (run.cell.precision, run.cell.concurrency, run.repeat) == (cell.precision, cell.concurrency, repeat)
            and run.server == TESTED
            and math.isinf(run.rate_per_s)
        ]
        if not capacity[0] > 0:
            raise InputError(f"no request at precision {cell.precision} was completed, so a rate of {cell.rate} is unknown")
        return cell.rate.value * capacity[0]
