"""How fast a real machine was, second by second, while a load test ran: what its steps took over what they were predicted to.

A machine that is slow for seconds at a time makes other requests miss than one whose steps vary one by one. So a simulation of
a real run needs the run's own speed. Tokens tell it, whose times are known (``loadtests.records``), and the width at which they
were computed, which the server was asked for (``loadtests.timeline``) by a clock that began earlier.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loadtests.records import Record

SECONDS = 1.0
"""Of which the mean speed is taken."""

FEWEST_TOKENS = 3
"""A second with fewer tokens tells nothing."""

MOST_OFFSET_S = 60.0
"""By which the two clocks may differ: the load test starts, and asks for some answers beforehand."""

STEP_S = 0.1

Predicted = Callable[[float, float, float, float], float]
"""(mean bits per weight, sequences, prompts per second, their mean tokens) -> milliseconds per token."""


def speeds_of(records: Sequence[Record], samples: Sequence[Mapping[str, Any]], predicted: Predicted) -> tuple[float, ...]:
    """For each SECONDS of the run, by how much longer steps took than ``predicted``; empty if nothing tells.

    Args:
        records: completed requests.
        samples: of ``timeline.json``.
    """
    width_at = widths_of(records, samples)
    if not records or width_at is None:
        return ()
    count = int(max(record.end_s for record in records) / SECONDS) + 1
    gaps, tokens, prompts, prompt_tokens = ([0.0] * count for _ in range(4))
    for record in records:
        at = record.start_s + record.ttft_s
        prompts[_bucket(at, count)] += 1
        prompt_tokens[_bucket(at, count)] += record.input_tokens
        for gap in record.gaps_s:
            at += gap
            gaps[_bucket(at, count)] += gap
            tokens[_bucket(at, count)] += 1
    found: dict[int, float] = {}
    for index in range(count):
        if tokens[index] >= FEWEST_TOKENS:
            width = width_at((index + 0.5) * SECONDS)
            mean = prompt_tokens[index] / prompts[index] if prompts[index] else 0.0
            # Gaps of a second add up to as many seconds as sequences decode.
            expected = predicted(width, gaps[index] / SECONDS, prompts[index] / SECONDS, mean)
            found[index] = 1e3 * gaps[index] / tokens[index] / expected
    if not found:
        return ()
    # Seconds that tell nothing are between those that do.
    return tuple(interpolated(index, list(found), list(found.values())) for index in range(count))


def widths_of(records: Sequence[Record], samples: Sequence[Mapping[str, Any]]) -> Callable[[float], float] | None:
    """The mean width that ran at a moment of the run, as the server told last before it; None if it never did."""
    offset = offset_of(records, samples)
    seen = [(sample["time_s"] - offset, sample["width"]) for sample in samples if sample["width"] is not None]
    times = [at for at, _ in seen]
    return (lambda at_s: seen[max(bisect_right(times, at_s) - 1, 0)][1]) if seen else None


def offset_of(records: Sequence[Record], samples: Sequence[Mapping[str, Any]]) -> float:
    """Seconds on the clock of ``samples`` when the run began: where the numbers of requests in flight agree best."""
    changes = sorted([(record.start_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    moments = [at for at, _ in changes]
    in_flight = [0]
    for _, change in changes:
        in_flight.append(in_flight[-1] + change)

    def disagreement(offset: float) -> float:
        return sum(
            abs(sample["running"] + sample["waiting"] - in_flight[bisect_right(moments, sample["time_s"] - offset)])
            for sample in samples
        )

    return min((index * STEP_S for index in range(round(MOST_OFFSET_S / STEP_S))), key=disagreement)


def _bucket(at_s: float, count: int) -> int:
    return min(int(at_s / SECONDS), count - 1)


def interpolated(place: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Linear between ``places``, which rise; beyond them as at the first or the last."""
    index = bisect_right(places, place)
    if index in (0, len(places)):
        return values[0 if index == 0 else -1]
    low, high = places[index - 1], places[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (place - low) / (high - low)
