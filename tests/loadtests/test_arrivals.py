"""loadtests.arrivals: how many requests come, and when."""

import random
from itertools import pairwise

import pytest

from loadtests.arrivals import Bursts, fixed, poisson

BURSTS = Bursts(factor=5, calm_s=20, burst_s=10)


def test_fixed_arrivals_are_evenly_spaced() -> None:
    assert fixed(2, 2) == [0, 0.5, 1, 1.5]
    assert fixed(0.01, 2) == [0]


def test_poisson_arrivals_have_the_rate_and_no_memory() -> None:
    arrivals = poisson(2, 5000, random.Random(1))
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / 5000 == pytest.approx(2, rel=0.05)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    # An exponential distribution's standard deviation is its mean.
    mean = sum(gaps) / len(gaps)
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.05)


def test_bursts_come_at_the_mean_of_both_rates() -> None:
    arrivals = BURSTS.arrivals(1, 2000, random.Random(1))
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] < 2000
    # Two thirds of the time at 1 per second and one third at 5.
    assert len(arrivals) / 2000 == pytest.approx(7 / 3, rel=0.15)


def test_bursts_are_five_times_as_dense() -> None:
    per_second = [0] * 2000
    for arrival in BURSTS.arrivals(1, 2000, random.Random(1)):
        per_second[int(arrival)] += 1
    assert sum(count >= 4 for count in per_second) > 300
    assert sum(count <= 1 for count in per_second) > 800
    flat = Bursts(factor=1, calm_s=20, burst_s=10).arrivals(1, 2000, random.Random(1))
    assert len(flat) / 2000 == pytest.approx(1, rel=0.1)
