from itertools import count

import pytest

from matgptq_vllm.kernels.bench.timing import MAX_COPIES, MIN_COPIES, Timing, num_calls, num_copies, summarize, take_turns


def test_copies_fill_the_cache_several_times_within_bounds():
    assert num_copies(10_000_000) == 40
    assert num_copies(9_999_999) == 41
    assert num_copies(10**9) == MIN_COPIES
    assert num_copies(1) == MAX_COPIES


@pytest.mark.parametrize(("copies", "bytes_read", "flops"), [(4, 2.4e8, 2.4e8), (64, 4e6, 1e9), (7, 6e7, 1.2e12), (5, 1, 1)])
def test_every_copy_is_called_equally_often_and_a_replay_is_long_enough(copies: int, bytes_read: float, flops: float):
    calls = num_calls(copies, int(bytes_read), flops)
    assert calls % copies == 0
    longest_call_us = max(int(bytes_read) / 4.5e6, flops / 8e8)
    assert calls * longest_call_us >= 400
    assert calls == copies or (calls - copies) * longest_call_us < 400


def test_the_median_is_of_the_rounds_and_extremes_are_kept():
    assert summarize([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0, 3)
    assert summarize([4.0, 1.0]).median_us == 2.5


def test_the_first_round_is_dropped_and_one_slow_round_does_not_count():
    rounds = iter([900.0, 10.0, 11.0, 500.0, 10.5, 9.5])
    timings = take_turns(lambda: {"a": (us := next(rounds)), "b": 2 * us}, rounds=5, seconds=60.0, clock=lambda: 0.0)
    assert timings["a"] == Timing(10.5, 9.5, 500.0, 5)
    assert timings["b"].median_us == 21.0


@pytest.mark.parametrize(("seconds", "expected"), [(100.0, 20), (12.5, 11), (5.0, 4), (1.0, 3), (-3.0, 3)])
def test_rounds_are_left_out_to_keep_to_the_time_but_never_below_three(seconds: float, expected: int):
    seen = []
    ticks = count()  # every look at the clock is one second later, and it is looked at around the first round only
    timings = take_turns(lambda: seen.append(1) or {"a": 1.0}, rounds=20, seconds=seconds, clock=lambda: float(next(ticks)))
    assert timings["a"].rounds == expected == len(seen) - 1
