"""How fast requests come, now and soon: a filter over rates, which learns how bursty the traffic is.

The rate of arrivals is one of a fixed grid of values and now and then jumps to another one. After each arrival the filter
weighs every rate by how well it explains the time since the last one. Where a jump leads is learned: to a rate in proportion
to the share of arrivals that came at it. So the first bursts are recognized after some ten requests, and later ones, whose
rate is known by then, after three or four.
"""

import math
from collections.abc import Callable, Sequence

SLOWEST = 1 / 64
"""Lowest rate of the grid, in requests per second."""

STEPS_PER_OCTAVE = 4

OCTAVES = 16
"""The grid reaches 2 ** OCTAVES times SLOWEST: 1024 requests per second."""

JUMPS_PER_S = 0.05
"""How often the rate is thought to jump: about once in 20 s."""

MEMORY = 2000
"""Arrivals that the learned shares remember."""

PRIOR_ARRIVALS = 20.0
"""Weight of the shares with which learning starts."""


class ArrivalRate:
    """Estimates the rate of one stream of requests.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        size = OCTAVES * STEPS_PER_OCTAVE + 1
        self._rates = [SLOWEST * 2 ** (index / STEPS_PER_OCTAVE) for index in range(size)]
        # Slow until shown otherwise: the first requests of an idle server are no burst.
        total = sum(1 / rate for rate in self._rates)
        self._belief = [1 / rate / total for rate in self._rates]
        self._first = [PRIOR_ARRIVALS * belief for belief in self._belief]
        self._learned = [0.0] * size
        self._known = False
        self._last: float | None = None

    def arrived(self) -> None:
        """Take note of a request that comes now."""
        now = self._clock()
        if self._last is not None:
            self._known = True
            gap = max(now - self._last, 1e-6)
            belief = self._after(gap)
            belief = [weight * rate for weight, rate in zip(belief, self._rates, strict=True)]
            total = sum(belief)
            self._belief = [weight / total for weight in belief]
            keep = 1 - 1 / MEMORY
            self._learned = [keep * share + weight for share, weight in zip(self._learned, self._belief, strict=True)]
        self._last = now

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        """The rates per second, now, that the true one exceeds with probability 1 - level; 0 before the second arrival."""
        if self._last is None or not self._known:
            return [0.0] * len(levels)
        belief = self._after(max(self._clock() - self._last, 0.0))
        return [self._quantile(belief, level) for level in levels]

    def _quantile(self, belief: Sequence[float], level: float) -> float:
        below = 0.0
        for index, weight in enumerate(belief):
            if below + weight >= level:
                # Between two rates of the grid, so that the quantile moves smoothly.
                part = (level - below) / weight if weight else 0.0
                lower = self._rates[max(index - 1, 0)]
                return lower * (self._rates[index] / lower) ** part
            below += weight
        return self._rates[-1]

    def busy(self, level: float) -> float:
        """The rate per second at or below which the share ``level`` of the remembered arrivals came; what bursts bring."""
        below, total = 0.0, sum(self._learned)
        if total <= 0:
            return 0.0
        for share, rate in zip(self._learned, self._rates, strict=True):
            below += share
            if below >= level * total:
                return rate
        return self._rates[-1]

    def _after(self, gap: float) -> list[float]:
        """Belief after ``gap`` seconds without an arrival; sums to 1."""
        jumped = 1 - math.exp(-JUMPS_PER_S * gap)
        shares = [first + learned for first, learned in zip(self._first, self._learned, strict=True)]
        total_share = sum(shares)
        belief = [
            ((1 - jumped) * weight + jumped * share / total_share) for weight, share in zip(self._belief, shares, strict=True)
        ]
        # The slowest rate explains silence best; factoring it out keeps the sum away from 0.
        belief = [weight * math.exp(-(rate - SLOWEST) * gap) for weight, rate in zip(belief, self._rates, strict=True)]
        total = sum(belief)
        return [weight / total for weight in belief] if total > 0 else [1.0] + [0.0] * (len(self._rates) - 1)
