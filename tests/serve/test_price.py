"""serve.price: what a miss costs, by what has been missed."""

import pytest

from serve.price import (
    CLEAN_REQUESTS,
    CLEAN_S,
    FIRST_PRICE,
    GAP_S,
    LEARNING,
    LEAST,
    MAX_PRICE,
    MIN_PRICE,
    MISSES,
    Price,
)


class Clock:
    """Seconds, as they are set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ended(price: Price, clock: Clock, count: int, apart_s: float, missed: bool = False) -> None:
    for _ in range(count):
        clock.now += apart_s
        price.learn(missed)


def test_it_rests_where_fewer_miss_than_may_and_has_bounds(clock: Clock) -> None:
    price = Price(clock)
    for number in range(1000):
        price.learn(number % round(1 / MISSES) == 0)
    assert price.bits == pytest.approx(FIRST_PRICE, rel=0.02)
    for missed, bound in ((True, MAX_PRICE), (False, MIN_PRICE)):
        for _ in range(10_000):
            price.learn(missed)
        assert price.bits == bound


def test_after_a_minute_without_a_miss_it_falls_until_the_next_one(clock: Clock) -> None:
    price = Price(clock)
    ended(price, clock, 1 + round(CLEAN_S), 1.0)
    assert price.bits == pytest.approx(FIRST_PRICE, rel=0.05)
    ended(price, clock, 30, 1.0)
    assert LEAST * FIRST_PRICE < price.bits < 0.7 * FIRST_PRICE
    ended(price, clock, 60, 1.0)
    learned = FIRST_PRICE * (1 - LEARNING * MISSES) ** 151
    assert price.bits == pytest.approx(LEAST * learned, rel=0.01)
    ended(price, clock, 1, 1.0, missed=True)
    assert price.bits == pytest.approx(learned, rel=0.02)


def test_few_requests_say_little_and_none_say_nothing(clock: Clock) -> None:
    price = Price(clock)
    ended(price, clock, CLEAN_REQUESTS, 5.0)
    assert price.bits > 0.9 * FIRST_PRICE
    busy = Price(clock)
    ended(busy, clock, 1 + CLEAN_REQUESTS, 0.5)
    ended(busy, clock, 1, 3600.0)
    assert CLEAN_REQUESTS * 0.5 + GAP_S < CLEAN_S
    assert busy.bits > 0.9 * FIRST_PRICE
