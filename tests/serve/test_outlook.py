"""serve.outlook: what a plan does to those that run and to those that come."""

import math

import pytest

from serve.outlook import AHEAD_MS, Chance, Outlook, Plan, Scene, StepCost

QUIET = Chance(0.0, 1.0)
WIDE, NARROW = Plan(1, math.inf, 1), Plan(0, math.inf, 0)


def scene(**changes) -> Scene:
    """Steps take 10 ms at 2 bits and 20 at 8, and 1 more for each sequence; requests write 50 tokens."""
    return Scene(
        **{
            "costs": (StepCost(10.0, 1.0, 5.0, 2.0), StepCost(20.0, 1.0, 5.0, 8.0)),
            "budget_ms": 24.0,
            "running": 1.0,
            "lives": (),
            "stands_for": 1.0,
            "left": (),
            "new": (50.0, 50.0),
            "mean_tokens": 50.0,
            "ends_per_step": 0.0,
            "prompts_waiting": 0.0,
            "max_running": 100.0,
            "deviations": (0.0,),
            **changes,
        }
    )


def lived(tokens: float, pace_ms: float, left: float, **changes) -> Scene:
    """One request that has taken ``pace_ms`` per token so far."""
    return scene(lives=((tokens, tokens * pace_ms),), left=((left, left),), **changes)


def test_alone_a_request_takes_what_its_steps_take() -> None:
    for plan, pace, bits in ((WIDE, 21.0, 8.0), (NARROW, 11.0, 2.0)):
        value, pace_ms = Outlook(scene()).judge(plan, QUIET, 20.0)
        assert pace_ms == pytest.approx(pace)
        assert value == pytest.approx(bits, abs=0.1)


def test_a_plan_that_changes_is_as_wide_as_its_parts() -> None:
    value, pace_ms = Outlook(scene()).judge(Plan(1, 500.0, 0), QUIET, 0.0)
    # 24 tokens in the first half second, and 4.5 s at 11 ms.
    assert value == pytest.approx((24 * 8 + 409 * 2) / 433, rel=0.05)
    assert pace_ms == pytest.approx((24 * 21 + 26 * 11) / 50, rel=0.05)


def test_who_has_been_fast_has_time_to_spend_and_who_has_been_slow_can_be_saved() -> None:
    # 25 ms per token from now on, against a budget of 24.
    def missed(life: Scene, plan: Plan) -> float:
        free, paid = (Outlook(life).judge(plan, QUIET, price)[0] for price in (0.0, 1.0))
        return free - paid

    busy = {"running": 5.0, "stands_for": 5.0}
    assert missed(lived(25, 15.0, 25, **busy), WIDE) < 0.05 * missed(lived(25, 24.0, 25, **busy), WIDE)
    slow = lived(25, 30.0, 25, **busy)
    assert missed(slow, NARROW) < 0.05 * missed(slow, WIDE)


def test_those_that_come_make_steps_longer_and_misses_likelier() -> None:
    values = [Outlook(scene()).judge(WIDE, Chance(rate, 1.0), 20.0) for rate in (0.0, 0.001, 0.004, 0.01)]
    assert [pace for _, pace in values] == sorted(pace for _, pace in values)
    assert [value for value, _ in values] == sorted((value for value, _ in values), reverse=True)
    life = scene(budget_ms=28.0, ends_per_step=0.02)
    calm, noisy = (Outlook(life).judge(WIDE, Chance(0.002, noise), 20.0)[0] for noise in (0.5, 4.0))
    assert noisy < calm


def test_a_machine_whose_steps_vary_makes_misses_likelier() -> None:
    # 21 ms per token, against a budget of 24. Only errors larger than those that all engines are thought to have count.
    values = [Outlook(scene(deviations=(found,))).judge(WIDE, QUIET, 20.0)[0] for found in (0.0, 0.02, 0.05, 0.1, 0.2)]
    assert values[0] == values[1]
    assert values[1:] == sorted(values[1:], reverse=True)
    assert values[4] < values[3] < values[2] < values[1]


def test_a_long_life_has_the_error_of_many_steps() -> None:
    lasting, passing = (
        Outlook(scene(deviations=found)).judge(WIDE, QUIET, 20.0)[0] for found in ((0.1,), (0.1, 0.07, 0.05, 0.0))
    )
    assert lasting < passing == Outlook(scene()).judge(WIDE, QUIET, 20.0)[0]


def test_prompts_that_wait_count_once() -> None:
    without, with_prompts = (Outlook(scene(prompts_waiting=float(count))).judge(WIDE, QUIET, 0.0)[1] for count in (0, 20))
    assert with_prompts - without == pytest.approx(20 * 5.0 / 50)


def test_a_model_that_knows_nothing_sees_no_misses() -> None:
    free = scene(costs=(StepCost(0.0, 0.0, 0.0, 2.0), StepCost(0.0, 0.0, 0.0, 8.0)))
    assert Outlook(free).judge(WIDE, Chance(0.01, 1.0), 20.0) == (8.0, 0.0)
    assert AHEAD_MS > 0
