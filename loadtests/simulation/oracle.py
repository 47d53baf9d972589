"""The oracle: a plan of widths made with knowledge of all arrivals, all lengths, and the engine's true step times.

The trace is cut into spans, and all requests of a span get one width. The oracle climbs: it tries another width for a span,
or for a run of spans, plays what follows with the engine's own noise, and keeps what is better by

    sum of widths over tokens, counted in requests of mean length - price * requests that miss the budget

It starts from several plans: all at the widest, the widest single width that meets the budget often enough, and those that it
is given, such as what the controller did on the same trace. A plan that misses too often climbs at rising prices until it does
not; one that meets the budget often enough climbs at falling prices, spending the misses that are allowed. The widest plan
found is the result. A trial is played for HORIZON_S after the change, or for LIVES of a request if that is more. The plan
may be bound to the rule that every policy has to keep, no two switches in opposite directions within so many seconds; nothing
else binds it. It is a lower bound of the best plan there is (climbing may stop early), and no policy without knowledge of the
future can be expected to reach it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from loadtests.simulation.engine import WIDTHS, Engine, Hardware, Served
from loadtests.simulation.trace import Arrival

SPAN_S = 2.5
"""Length of a span."""

HORIZON_S = 16.0
"""How long after a change its effects are played, at least."""

LIVES = 1.5
"""The same in lives of a request of mean length at the budget's pace."""

RUNS = (6, 2, 1)
"""Spans that are changed together, one size after the other. A single one can only move the edge of a longer run where the
rule on switches holds."""

PRICES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Tried in this order, each from the plan of the last, until the budget is met often enough."""

SPENDING_PRICES = (8.0, 2.0, 0.5, 0.0)
"""Tried in this order afterwards, with no more misses than are allowed."""


@dataclass(frozen=True)
class Planned:
    """What the oracle found."""

    starts_s: list[float]
    widths: list[int]
    """Indices in WIDTHS, for each span."""

    met: float
    """Share of the requests that meet the budget under it."""


def plan(
    trace: Sequence[Arrival],
    hardware: Hardware,
    tpot_ms: float,
    seed: int,
    target: float,
    elastic: bool = False,
    hold_s: float = 0.0,
    known: Sequence[Sequence[int]] = (),
) -> Planned:
    """The widest plan found under which at least the share ``target`` of the requests meets ``tpot_ms``; the one that meets it
    most often if there is none.

    Args:
        hold_s: least time between switches in opposite directions.
        known: plans to start from too: for each span an index in WIDTHS. Those that break the rule on switches are left out.
    """
    count = num_spans(trace)
    searches = [_Search(trace, hardware, tpot_ms, seed, elastic, hold_s, [len(WIDTHS) - 1] * count)]
    for index in reversed(range(len(WIDTHS) - 1)):
        fixed = _Search(trace, hardware, tpot_ms, seed, elastic, hold_s, [index] * count)
        if fixed.share_met() >= target:
            searches.append(fixed)
            break
    searches += [_Search(trace, hardware, tpot_ms, seed, elastic, hold_s, widths) for widths in known]
    allowed = int((1 - target) * len(trace) + 1e-9)
    found = []
    for search in searches:
        if not search.steady(search.widths):
            continue
        for price in PRICES:
            if search.num_missed() <= allowed:
                break
            search.climb(price)
        if search.num_missed() <= allowed:
            for price in SPENDING_PRICES:
                search.climb(price, allowed)
        found.append(search)
    best = max(found, key=lambda search: (min(search.share_met(), target), search.width()))
    return Planned([index * SPAN_S for index in range(count)], list(best.widths), best.share_met())


def spans_of(levels: Sequence[tuple[float, int]], trace: Sequence[Arrival]) -> list[int]:
    """The plan that is nearest to (seconds, index in WIDTHS) looks of a policy: each span has the level at its beginning."""
    times = [at_s for at_s, _ in levels]
    found = []
    for index in range(num_spans(trace)):
        found.append(levels[max(0, bisect_right(times, index * SPAN_S) - 1)][1])
    return found


def num_spans(trace: Sequence[Arrival]) -> int:
    """Into how many spans the oracle cuts ``trace``."""
    return int(trace[-1].at_s // SPAN_S) + 1


class _Search:
    """A plan and, for every span, the engine at its beginning under that plan."""

    def __init__(
        self,
        trace: Sequence[Arrival],
        hardware: Hardware,
        tpot_ms: float,
        seed: int,
        elastic: bool,
        hold_s: float,
        widths: Sequence[int],
    ) -> None:
        self.elastic = elastic
        self.hold_s = hold_s
        self.tpot_ms = tpot_ms
        self.spans: list[list[Arrival]] = [[] for _ in range(num_spans(trace))]
        for arrival in trace:
            self.spans[int(arrival.at_s // SPAN_S)].append(arrival)
        self.widths = list(widths)
        self.engines: list[Engine] = [Engine(hardware, seed)]
        self.missed: list[set[int]] = []
        self.played: dict[tuple[int, bytes, bytes], _Played] = {}
        self.total = len(trace)
        # The first token of a request is its prompt's.
        self.mean_tokens = sum(arrival.output_tokens - 1 for arrival in trace) / len(trace)
        self.horizon = math.ceil(max(HORIZON_S, LIVES * self.mean_tokens * tpot_ms / 1e3) / SPAN_S)
        self.bits = 0
        self._replay(0)

    def share_met(self) -> float:
        return 1 - self.num_missed() / self.total

    def num_missed(self) -> int:
        return sum(map(len, self.missed))

    def width(self) -> float:
        """Mean over the tokens."""
        return self.bits / (self.mean_tokens * self.total)

    def climb(self, price: float, allowed: float = math.inf) -> None:
        """Improve the plan, with at most ``allowed`` misses in all, until a whole round finds nothing."""
        improved = True
        rounds = 0
        while improved and rounds < 3:
            improved = False
            rounds += 1
            for run in RUNS:
                for first in range(0, len(self.widths), max(1, run // 2)):
                    improved |= self._improve(first, min(first + run, len(self.widths)), price, allowed)

    def _improve(self, first: int, end: int, price: float, allowed: float) -> bool:
        until = min(len(self.spans), end + self.horizon)
        before, total = self._play(self.widths[first:until], first, until), self.num_missed()
        best, best_widths = self._value(before, price) + 1e-9, None
        for width in range(len(WIDTHS)):
            widths = list(self.widths)
            widths[first:end] = [width] * (end - first)
            if widths == self.widths or not self.steady(widths):
                continue
            played = self._play(widths[first:until], first, until)
            value = self._value(played, price)
            if value > best and total + played.missed - before.missed <= allowed:
                best, best_widths = value, widths
        if best_widths is None:
            return False
        present, self.widths = self.widths, best_widths
        self._replay(first)
        if self.num_missed() > allowed:
            # What the trial's horizon did not show.
            self.widths = present
            self._replay(first)
            return False
        return True

    def steady(self, widths: Sequence[int]) -> bool:
        """Whether no two switches in opposite directions are too close."""
        switches = [(index, after > before) for index, (before, after) in enumerate(pairwise(widths)) if after != before]
        return all(
            up == other or (later - earlier) * SPAN_S >= self.hold_s for (earlier, up), (later, other) in pairwise(switches)
        )

    def _value(self, played: "_Played", price: float) -> float:
        return played.bits / self.mean_tokens - price * played.missed

    def _play(self, widths: Sequence[int], first: int, until: int) -> "_Played":
        """What becomes of the requests in flight from span ``first`` to ``until``; those unfinished then are judged by their
        pace so far, and go on as they are."""
        # What was a horizon before does not matter any more, as in every trial. Most trials of a round are those of the last.
        key = (first, bytes(self.widths[max(0, first - self.horizon) : first]), bytes(widths))
        if key not in self.played:
            self.played[key] = self._play_anew(widths, first, until)
        return self.played[key]

    def _play_anew(self, widths: Sequence[int], first: int, until: int) -> "_Played":
        engine = self.engines[first].clone()
        bits_before, missed = _bits(engine), 0

        def judge(served: Served) -> None:
            nonlocal missed
            missed += served.tpot_ms > self.tpot_ms

        for offset, index in enumerate(range(first, until)):
            self._span(engine, index, widths[offset], judge)
        if until == len(self.spans):
            while engine.requests:
                engine.advance(engine.now_s + 1.0, judge)
            return _Played(missed, _bits(engine) - bits_before)
        bits = _bits(engine) - bits_before
        left = {number: served.arrival.output_tokens - 1 for number, served in engine.requests.items()}
        for last, number in engine.ends:
            served = engine.requests[number]
            left[number] = last - engine.steps
            done = served.arrival.output_tokens - 1 - left[number]
            missed += done > 0 and (engine.now_s - served.first_s) * 1e3 > self.tpot_ms * done
        for number, tokens in left.items():
            bits += tokens * WIDTHS[engine.requests[number].width if engine.follow is None else engine.follow]
        return _Played(missed, bits)

    def _replay(self, first: int) -> None:
        """Bring ``engines`` and ``missed`` up to date from span ``first`` on."""
        del self.engines[first + 1 :], self.missed[first:]
        engine = self.engines[first].clone()
        for index in range(first, len(self.spans)):
            missed: set[int] = set()
            self.missed.append(missed)

            def judge(served: Served, missed: set[int] = missed) -> None:
                if served.tpot_ms > self.tpot_ms:
                    missed.add(served.arrival.number)

            self._span(engine, index, self.widths[index], judge)
            if index + 1 < len(self.spans):
                self.engines.append(engine.clone())
        while engine.requests:
            engine.advance(engine.now_s + 1.0, judge)
        self.bits = _bits(engine)

    def _span(self, engine: Engine, index: int, width: int, judge) -> None:  # type: ignore[no-untyped-def]
        if self.elastic:
            engine.change_all(width)
        for arrival in self.spans[index]:
            engine.advance(arrival.at_s, judge)
            engine.submit(Served(arrival, width))
        engine.advance((index + 1) * SPAN_S, judge)


class _Played(NamedTuple):
    """What a trial came to."""

    missed: int
    """Requests above the budget."""

    bits: int
    """Sum of widths over tokens."""


def _bits(engine: Engine) -> int:
    return sum(width * tokens for width, tokens in zip(WIDTHS, engine.tokens, strict=True))
