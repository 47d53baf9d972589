"""serve.output_lengths: what is known of how much requests write."""

import random

import pytest

from serve.output_lengths import FIRST_TOKENS, QUANTILES, REMEMBERED, OutputLengths


def test_before_any_request_has_ended_all_is_a_guess() -> None:
    lengths = OutputLengths()
    assert lengths.mean == lengths.mean_with([5.0], 1) == FIRST_TOKENS
    assert len(lengths.left(0)) == len(QUANTILES)
    assert all(left >= 1 for left in lengths.left(1e6))


def test_the_last_requests_decide() -> None:
    lengths = OutputLengths()
    for tokens in [1000] * 20 + [10, 30] * (REMEMBERED // 2):
        lengths.ended(tokens)
    assert lengths.mean == 20
    assert lengths.ends_per_step == pytest.approx(2 * 20 / 500)
    assert lengths.left(0) == (10, 30)
    assert lengths.left(12) == (18, 18)


def test_what_has_outlived_all_others_may_end_at_any_time() -> None:
    lengths = OutputLengths()
    lengths.ended(40)
    assert all(1 <= left < 40 for left in lengths.left(40))


def test_those_that_still_run_make_up_for_the_long_ones_that_have_not_ended() -> None:
    chance = random.Random(0)
    drawn = [1 + int(chance.expovariate(1 / 100)) for _ in range(400)]
    lengths = OutputLengths()
    # All came together 80 steps ago.
    for tokens in drawn:
        if tokens <= 80:
            lengths.ended(tokens)
    running = [80.0] * sum(tokens > 80 for tokens in drawn)
    assert lengths.mean < 40
    assert 60 < lengths.mean_with(running[:16], len(running)) < 110
