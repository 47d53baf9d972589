"""How far the time of so many steps in a row is from its prediction.

The errors of single steps cancel only in part: slow steps come together where other work has the same cores. So errors are
averaged over blocks of 1, 2, 4, ... steps, and the mean squares of these averages are what is remembered.
"""

import math
from dataclasses import dataclass

LENGTHS = 8
"""Blocks of up to 2 ** (LENGTHS - 1) steps."""

REMEMBERED = 32
"""Blocks of a length that its mean square remembers."""

ENOUGH = 8
"""Blocks after which their mean square is taken as it is."""

LASTING = 0.75
"""What is thought to be left of a mean square in blocks twice as long, as long as few of them are known: half of it lasts."""


@dataclass
class _Blocks:
    """Blocks of one length."""

    count: int = 0
    square: float = 0.0
    """Mean square of their errors."""

    half: float | None = None
    """Error of the first half of a block."""

    def add(self, error: float) -> None:
        self.count += 1
        self.square += (error**2 - self.square) / min(self.count, REMEMBERED)


class StepErrors:
    """Relative errors of predictions, over blocks of steps."""

    def __init__(self) -> None:
        self._lengths = [_Blocks() for _ in range(LENGTHS)]

    def add(self, error: float) -> None:
        """A step took 1 + ``error`` times as long as predicted."""
        for blocks in self._lengths:
            blocks.add(error)
            first = blocks.half
            if first is None:
                blocks.half = error
                return
            blocks.half, error = None, (first + error) / 2

    def deviations(self) -> tuple[float, ...]:
        """Root mean square of the error of the mean over 1, 2, 4, ... steps; 0 while no step is known."""
        squares = [self._lengths[0].square]
        for blocks in self._lengths[1:]:
            known = min(blocks.count / ENOUGH, 1.0)
            squares.append(known * blocks.square + (1 - known) * LASTING * squares[-1])
        return tuple(map(math.sqrt, squares))
