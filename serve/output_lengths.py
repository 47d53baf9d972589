"""How many tokens requests write: in the mean, and how many one that has written some still has to.

Among requests that came together the short ones end first. So the memory is long, and the mean counts those that still run
as what they are likely to become: otherwise requests would seem short at the beginning of every burst.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

REMEMBERED = 512
"""Requests."""

FIRST_TOKENS = 128.0
"""Output tokens that a request is thought to have before any has ended."""

QUANTILES = (0.25, 0.75)
"""Of the tokens left: what stands for their distribution."""


class OutputLengths:
    """The output tokens of the last requests that ended."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._sum = self._squares = 0

    def ended(self, tokens: int) -> None:
        """A request has ended after so many output tokens."""
        tokens = max(1, tokens)
        self._recent.append(tokens)
        insort(self._sorted, tokens)
        self._sum += tokens
        self._squares += tokens**2
        if len(self._recent) > REMEMBERED:
            oldest = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]
            self._sum -= oldest
            self._squares -= oldest**2

    @property
    def mean(self) -> float:
        """Output tokens of a request."""
        return self._sum / len(self._recent) if self._recent else FIRST_TOKENS

    @property
    def ends_per_step(self) -> float:
        """Share of the running requests that end with each step: by renewal theory, those that run have half of the mean
        square over the mean to go."""
        return 2 * self._sum / self._squares if self._recent else 1 / FIRST_TOKENS

    def mean_with(self, sample: Sequence[float], count: int) -> float:
        """Output tokens of a request, ``count`` running ones included, of which ``sample`` have written so many tokens."""
        if not self._recent or not sample:
            return self.mean
        expected = sum(tokens + sum(self.left(tokens)) / len(QUANTILES) for tokens in sample) / len(sample)
        return (self._sum + count * expected) / (len(self._recent) + count)

    def left(self, tokens: float) -> tuple[float, ...]:
        """How many more a request writes that has written ``tokens``, at QUANTILES; at least 1."""
        first = bisect_left(self._sorted, tokens + 1)
        longer = len(self._sorted) - first
        if longer:
            return tuple(max(1.0, self._sorted[first + int(level * longer)] - tokens) for level in QUANTILES)
        # None was as long: as if the end could come with every token.
        mean = self.mean / 4 if self._recent else self.mean
        return tuple(max(1.0, -math.log(1 - level) * mean) for level in QUANTILES)
