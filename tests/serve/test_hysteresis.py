"""serve.hysteresis: when the level of a class may change."""

import math

from hypothesis import given
from hypothesis import strategies as st

from serve.hysteresis import EVIDENCE_S, FOLLOWED_EVIDENCE_S, HOLD_S, PATIENCE_S, Level

NOTHING = [-math.inf] * 3


def test_followed_the_level_goes_down_at_once_and_up_with_evidence_after_the_hold() -> None:
    level = Level(2, 3)
    level.follow([5.0, 4.0, 3.0], 10.0)
    assert level.index == 0
    now = 10.0
    while level.index == 0:
        now += 0.5
        level.follow([2.0, 6.0, 4.0], now)
    assert (level.index, now) == (1, 10.0 + HOLD_S)


def test_a_lull_is_no_evidence() -> None:
    level = Level(0, 3)
    level.follow([2.0, 1.0, 8.0], 0.0)
    level.follow([2.0, 1.0, 1.0], FOLLOWED_EVIDENCE_S / 2)
    level.follow([2.0, 1.0, 8.0], FOLLOWED_EVIDENCE_S)
    assert level.index == 0
    level.follow([2.0, 1.0, 8.0], 2 * FOLLOWED_EVIDENCE_S)
    assert level.index == 2


def test_what_was_better_than_the_profile_before_a_step_up_is_no_evidence_after_it() -> None:
    level = Level(0, 3)
    for now in (0.0, FOLLOWED_EVIDENCE_S):
        level.follow([2.0, 6.0, 4.0], now)
    assert level.index == 1
    level.follow([-math.inf, 6.0, 6.1], FOLLOWED_EVIDENCE_S + 0.1)
    assert level.index == 1
    level.follow([-math.inf, 6.0, 6.1], 2 * FOLLOWED_EVIDENCE_S + 0.2)
    assert level.index == 2


def test_if_nothing_will_do_the_narrowest_is_left() -> None:
    level = Level(2, 3)
    level.follow(NOTHING, 0.0)
    assert level.index == 0


def test_kept_a_step_up_waits_for_the_widest_but_not_for_ever() -> None:
    for also, waits in ((EVIDENCE_S + 2, EVIDENCE_S + 2), (PATIENCE_S, PATIENCE_S)):
        level, now = Level(0, 3), 0.0
        while level.index == 0:
            # The middle fits from the beginning, the widest only later.
            level.keep(1, 2 if now >= also - EVIDENCE_S else 1, now)
            now += 0.5
        assert waits <= now - 0.5 <= waits + 0.5
        assert level.index == 2


VALUES = st.one_of(st.just(NOTHING), st.lists(st.floats(-5, 8), min_size=3, max_size=3))


@given(st.lists(st.tuples(st.floats(0, 4), VALUES, st.integers(0, 2), st.integers(0, 2)), max_size=60), st.booleans())
def test_no_two_switches_in_opposite_directions_are_closer_than_the_hold(looks, followed) -> None:
    level, now = Level(1, 3), 0.0
    switched, up = -math.inf, None
    for wait, values, target, roomy in looks:
        before, now = level.index, now + wait
        if followed:
            level.follow(values, now)
        else:
            level.keep(target, roomy, now)
        if level.index != before:
            assert up in (None, level.index > before) or now - switched >= HOLD_S
            switched, up = now, level.index > before
