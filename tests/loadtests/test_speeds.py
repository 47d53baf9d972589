"""loadtests.simulation.speeds: the speed of a machine while a real load test ran."""

from typing import Any

import pytest

from loadtests.records import COMPLETED, Record
from loadtests.simulation.speeds import offset_of, speeds_of

LATE_S = 7.3
"""By which the clock of the samples is ahead."""


def record(number: int, start_s: float, token_ms: list[float]) -> Record:
    gaps = tuple(ms / 1e3 for ms in token_ms)
    end_s = start_s + 0.1 + sum(gaps)
    return Record(number, "auto", "8", COMPLETED, 200, start_s, start_s, 0.1, gaps, end_s, 20, len(gaps) + 1)


def samples_of(records: list[Record], width: float) -> list[dict[str, Any]]:
    return [
        {
            "time_s": at / 2,
            "running": sum(one.start_s <= at / 2 - LATE_S < one.end_s for one in records),
            "waiting": 0,
            "width": width,
        }
        for at in range(60)
    ]


# Fast for five seconds, then half as fast.
RUN = [record(number, 0.4 * number, [50.0] * 100 if number < 1 else [50.0] * 40 + [100.0] * 20) for number in range(20)]


def test_the_two_clocks_are_brought_together_where_they_agree_best() -> None:
    assert offset_of(RUN, samples_of(RUN, 8.0)) == pytest.approx(LATE_S, abs=0.3)


def test_a_machine_that_takes_twice_as_long_as_predicted_is_half_as_fast() -> None:
    run = [record(number, float(number), [50.0] * 40) for number in range(4)]
    run += [record(number, float(number), [100.0] * 40) for number in range(10, 14)]
    asked: list[tuple[float, float, float, float]] = []

    def predicted(*work: float) -> float:
        asked.append(work)  # type: ignore[arg-type]
        return 50.0

    speeds = speeds_of(run, samples_of(run, 6.0), predicted)
    assert speeds[1:4] == pytest.approx((1.0,) * 3)
    assert speeds[12:16] == pytest.approx((2.0,) * 4)
    assert all(0.95 <= speed <= 2.05 for speed in speeds)
    width, sequences, prompts, tokens = asked[2]
    assert (width, prompts, tokens) == (6.0, 1.0, 20.0)
    assert sequences == pytest.approx(2.0, abs=0.3)


def test_nothing_is_said_of_a_run_without_samples() -> None:
    assert speeds_of(RUN, [], lambda *_: 50.0) == ()
    assert speeds_of([], samples_of(RUN, 8.0), lambda *_: 50.0) == ()
