"""serve.lookahead: which of the profiles is worth most."""

import math

import pytest

from serve.hysteresis import HOLD_S
from serve.lookahead import LOOK_MS, Lookahead
from serve.outlook import AHEAD_MS, Chance, Outlook, Plan, Scene
from serve.price import FIRST_PRICE

from .test_outlook import lived, scene

STILL = (0.0, 0.0)


def best(life: Scene, level: int | None, rates=STILL, allowed=range(2)) -> int:
    values = Lookahead(life, rates, level, FIRST_PRICE, allowed).values
    return max(range(len(values)), key=values.__getitem__)


def test_a_profile_is_left_just_in_time() -> None:
    # 30 ms per token at 8 bits as long as these run, against a budget of 24, and 20 ms at 2 bits.
    busy = {"running": 10.0, "stands_for": 10.0, "ends_per_step": 0.05}
    assert best(lived(20, 15.0, 30, **busy), 1) == 1
    assert best(lived(30, 25.0, 20, **busy), 1) == 0


def test_a_step_up_must_be_good_for_as_long_as_it_cannot_be_taken_back() -> None:
    assert best(scene(), 0) == 1
    assert best(scene(budget_ms=19.0), 0) == 0
    # At 20 requests per second steps get slower than the budget within the hold.
    assert best(scene(), 0, (0.02, 0.02)) == 0
    assert AHEAD_MS == HOLD_S * 1e3


def test_where_a_request_that_comes_now_would_miss_everywhere_nothing_is_worth_anything() -> None:
    ahead = Lookahead(scene(budget_ms=5.0), STILL, 1, FIRST_PRICE, range(2))
    assert ahead.values == [-math.inf] * 2
    assert [ahead.pace_ms(index) for index in range(2)] == pytest.approx([11.0, 21.0])


def test_only_what_is_allowed_is_chosen_and_the_pace_of_all_is_known() -> None:
    ahead = Lookahead(scene(), STILL, 1, FIRST_PRICE, [0])
    assert ahead.values == [pytest.approx(2.0, abs=0.1), -math.inf]
    assert ahead.pace_ms(1) == pytest.approx(21.0)


def test_what_is_not_played_could_not_have_been_better() -> None:
    rates = (0.004, 0.006)
    for life in (scene(), scene(running=3.0), lived(25, 26.0, 25), lived(25, 22.0, 25, running=6.0, stands_for=6.0)):
        outlook, likely = Outlook(life), Chance(rates[0], 1.0)
        plans = [Plan(1, math.inf, 1), Plan(0, math.inf, 0), Plan(1, LOOK_MS, 0)]
        judged = [(outlook.judge(plan, likely, FIRST_PRICE), plan.first) for plan in plans]
        wanted = max(((value, first) for (value, pace), first in judged if pace <= life.budget_ms), default=(-math.inf, 0))
        values = Lookahead(life, rates, 1, FIRST_PRICE, range(2)).values
        assert (max(values), values.index(max(values))) == wanted
