"""Which profile running requests follow: plans are compared by the bits they read and the misses they risk (``serve.outlook``).

    stay, or step down    the profile is kept, or left for a narrower one in LOOK_MS. So a step down comes just in time: as long
                          as what runs can still be saved by the next look, the wide profile is worth more
    step up               held for AHEAD_MS, as it cannot be taken back earlier, and then left for the narrowest. Its risk is
                          seen more darkly: a chance arrival more, and it makes a whole clump of requests miss

A miss costs as much as a number of bits for every token of the request (``serve.price``).
"""

import math
from collections.abc import Sequence

from serve.outlook import AHEAD_MS, Chance, Outlook, Plan, Scene

LOOK_MS = 700.0
"""Until a decision can be changed: somewhat more than the time between two looks."""

RATE_LEVELS = (0.5, 0.85)
"""Quantiles of the believed arrival rate: for staying, and for steps up."""

DARK_NOISE = 2.0
"""Variance of what comes, over that of Poisson arrivals, for steps up."""

DARK_PRICE = 2.5
"""By which a miss costs more, for steps up."""


class Lookahead:
    """What to expect of each profile now; plans that cannot be the best are not played.

    Args:
        rates: requests per millisecond, at RATE_LEVELS.
        level: index of the present profile; None if there is none, and any may be taken.
        price: bits per token that a miss costs.
        allowed: indices that may become the level.
    """

    def __init__(self, scene: Scene, rates: Sequence[float], level: int | None, price: float, allowed: Sequence[int]) -> None:
        self._outlook = Outlook(scene)
        self._bits = [cost.bits for cost in scene.costs]
        self._budget_ms = scene.budget_ms
        self._likely, self._dark = Chance(rates[0], 1.0), Chance(rates[1], DARK_NOISE)
        self._price = price
        self._paces: list[float | None] = [None] * len(self._bits)
        self.values = [-math.inf] * len(self._bits)
        """Bits per token, less what misses cost; -inf: a request that comes now would miss, or another is better."""

        top = len(self._bits) - 1 if level is None else level
        best = -math.inf
        for first in reversed(range(top + 1)):
            # No plan is worth more than its bits.
            if first in allowed and self._bits[first] > best:
                best = max(best, self._stay(first, best, level is not None))
        for first in range(top + 1, len(self._bits)):
            if first in allowed and self._bits[first] > best:
                self._note(first, Plan(first, AHEAD_MS, 0), self._dark, price * DARK_PRICE)

    def pace_ms(self, index: int) -> float:
        """Time per output token of a request that comes now, under the plan with this profile."""
        pace = self._paces[index]
        if pace is None:
            pace = self._outlook.judge(Plan(index, math.inf, index), self._likely, self._price)[1]
        return pace

    def _stay(self, first: int, best: float, may_leave: bool) -> float:
        """Value of keeping ``first``, or of leaving it at the next look."""
        self._note(first, Plan(first, math.inf, first), self._likely, self._price)
        for then in reversed(range(first if may_leave else 0)):
            # As many tokens as time, roughly; more at first only if steps get slower, which they do not.
            most = self._bits[then] + (self._bits[first] - self._bits[then]) * LOOK_MS / AHEAD_MS
            if most > max(best, self.values[first]):
                self._note(first, Plan(first, LOOK_MS, then), self._likely, self._price)
        return self.values[first]

    def _note(self, first: int, plan: Plan, chance: Chance, price: float) -> None:
        value, pace = self._outlook.judge(plan, chance, price)
        if self._paces[first] is None or (pace <= self._budget_ms and value > self.values[first]):
            self._paces[first] = pace
            self.values[first] = value if pace <= self._budget_ms else -math.inf
