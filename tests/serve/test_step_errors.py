"""serve.step_errors: how far many steps together are from their predictions."""

import random

import pytest

from serve.step_errors import ENOUGH, LASTING, LENGTHS, StepErrors


def told(errors) -> tuple[float, ...]:
    found = StepErrors()
    for error in errors:
        found.add(error)
    return found.deviations()


def test_nothing_is_known_before_the_first_step() -> None:
    assert told([]) == (0.0,) * LENGTHS


def test_errors_that_have_nothing_to_do_with_each_other_cancel() -> None:
    randomness = random.Random(0)
    found = told(randomness.gauss(0.0, 0.1) for _ in range(10_000))
    assert found == pytest.approx([0.1 / 2 ** (length / 2) for length in range(LENGTHS)], rel=0.4)


def test_what_lasts_does_not_cancel() -> None:
    assert told([0.1] * 2000) == pytest.approx((0.1,) * LENGTHS)
    assert told([0.1, -0.1] * 1000)[:2] == pytest.approx((0.1, 0.0))


def test_of_long_blocks_that_were_not_met_a_part_of_the_shorter_ones_is_taken() -> None:
    found = told([0.1] * ENOUGH)
    assert found[0] == pytest.approx(0.1)
    squares = [deviation**2 for deviation in found]
    assert [squares[5] / squares[4], squares[7] / squares[6]] == pytest.approx([LASTING] * 2)


def test_what_was_long_ago_is_forgotten() -> None:
    assert told([0.5] * 100 + [0.0] * 20_000) == pytest.approx((0.0,) * LENGTHS, abs=0.01)
