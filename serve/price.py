"""What a miss costs, in bits for every token of the request: learned so that fewer requests miss than may.

Misses come in clumps that have one cause, so what is learned moves slowly, and in the first minutes it is what it began with.
Where none has missed for a while, through bursts as well as lulls, a miss costs less, until the next one: then at once as much
as before. So a clump costs few requests more, and an engine that has width to spare gets it within minutes.
"""

import math
from collections.abc import Callable

FIRST_PRICE = 20.0

MIN_PRICE, MAX_PRICE = 2.0, 128.0

LEARNING = 0.015
"""By how much the logarithm of the price rises with a miss."""

MISSES = 0.04
"""Share of misses at which the price rests: less than the 0.05 that are allowed."""

CLEAN_S = 60.0
"""Seconds without a miss after which it falls."""

CLEAN_REQUESTS = 50
"""How many must have ended meanwhile."""

FALL_S = 60.0
"""In which it falls by a factor of e."""

LEAST = 0.5
"""Share of the price to which it falls."""

GAP_S = 10.0
"""Most that a time without requests counts: nothing is learned from it."""


class Price:
    """Bits per token that a miss costs.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._learned = FIRST_PRICE
        self._clean_s = 0.0
        self._clean_requests = 0
        self._ended_at: float | None = None

    @property
    def bits(self) -> float:
        """As of the last request's end."""
        if self._clean_requests < CLEAN_REQUESTS:
            return self._learned
        share = max(LEAST, math.exp(-max(0.0, self._clean_s - CLEAN_S) / FALL_S))
        return max(self._learned * share, MIN_PRICE)

    def learn(self, missed: bool) -> None:
        """A request that was predicted to meet its budget has ended."""
        moved = self._learned * math.exp(LEARNING * (missed - MISSES))
        self._learned = min(max(moved, MIN_PRICE), MAX_PRICE)
        now = self._clock()
        if missed or self._ended_at is None:
            self._clean_s, self._clean_requests = 0.0, 0
        else:
            self._clean_s += min(now - self._ended_at, GAP_S)
            self._clean_requests += 1
        self._ended_at = now
