"""loadtests.engine.kernel_times: what is made of a profiler's events."""

from loadtests.engine.kernel_times import SHOWN, cells, per_step


def test_a_step_is_the_difference_of_two_runs_and_the_longest_comes_first() -> None:
    short = {"norm": (10.0, 2.0), "start": (50.0, 1.0), "product": (40.0, 4.0)}
    long = {"norm": (30.0, 6.0), "start": (55.0, 1.0), "product": (120.0, 12.0), "late": (8.0, 4.0)}
    assert per_step(short, long, 4) == {"product": (20.0, 2.0), "norm": (5.0, 1.0), "late": (2.0, 1.0)}


def test_a_table_ends_with_the_rest_and_the_sum() -> None:
    times = {f"kernel {index}": (float(100 - index), 2.0) for index in range(SHOWN + 3)}
    found = cells(times)
    assert found[0] == ["on the device", "us per step", "calls"]
    assert len(found) == 1 + SHOWN + 2
    assert found[-2] == ["3 more", f"{sum(range(100 - SHOWN - 2, 100 - SHOWN + 1)):.1f}", "6.0"]
    assert found[-1] == ["all", f"{sum(us for us, _ in times.values()):.1f}", f"{2.0 * len(times):.1f}"]
