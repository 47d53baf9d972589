"""The level of one class of budgets, and when it may change: never in opposite directions within HOLD_S.

down    at once, but not within HOLD_S after a switch up
up      not within HOLD_S after a switch down, and only with evidence: of every look for some seconds
"""

import math
from collections.abc import Sequence

HOLD_S = 5.0
"""Least time between switches in opposite directions."""

EVIDENCE_S = 5.0
"""For how long a wider profile must have fitted where requests keep theirs: a wide one that is running when a burst comes
cannot be helped."""

PATIENCE_S = 10.0
"""How long a step up waits for the widest profile that fits to have done so, before a narrower one is taken."""

FOLLOWED_EVIDENCE_S = 1.4
"""For how long a wider profile must have been better where requests follow: longer than a lull between arrivals."""


class Level:
    """Index of the widest profile that a class gets; pure, the time is an argument."""

    def __init__(self, index: int, count: int) -> None:
        self.index = index
        self._up_at = self._down_at = -math.inf
        # Of each profile: since when every look spoke for it, else infinity.
        self._since = [math.inf] * count

    def keep(self, target: int, roomy: int, now: float) -> None:
        """Take note of a look where requests keep their profiles.

        Args:
            target: what fits.
            roomy: what fits even if more requests come.
        """
        self._since = [math.inf if index > roomy else min(since, now) for index, since in enumerate(self._since)]
        if target < self.index:
            self._down(target, now)
            return
        wider = [since for since in self._since[self.index + 1 :] if since < math.inf]
        # The widest that fits is worth a wait: each switch makes batches mixed, and mixed batches slow, for a while.
        if wider and now - wider[0] >= EVIDENCE_S and (now - wider[-1] >= EVIDENCE_S or now - wider[0] >= PATIENCE_S):
            self._up(max(index for index, since in enumerate(self._since) if now - since >= EVIDENCE_S), now)

    def follow(self, values: Sequence[float], now: float) -> None:
        """Take note of a look where requests follow.

        Args:
            values: of each profile; if none is above -inf, the narrowest is wanted.
        """
        staying = max(values[: self.index + 1])
        self._since = [
            min(since, now) if index > self.index and value > staying else math.inf
            for index, (since, value) in enumerate(zip(self._since, values, strict=True))
        ]
        target = max(range(len(values)), key=values.__getitem__)
        if target < self.index:
            self._down(target, now)
        elif now - self._since[target] >= FOLLOWED_EVIDENCE_S and self._up(target, now):
            # What was better than the profile before is not therefore better than this one.
            self._since = [math.inf] * len(values)

    def _down(self, index: int, now: float) -> None:
        if now - self._up_at >= HOLD_S:
            self.index, self._down_at = index, now

    def _up(self, index: int, now: float) -> bool:
        """Whether it was possible."""
        possible = now - self._down_at >= HOLD_S
        if possible:
            self.index, self._up_at = index, now
        return possible
