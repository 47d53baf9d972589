"""The best profile if every unit's penalty were independent of the others: a multiple-choice knapsack, solved by
dynamic programming over a grid of costs. A start for the search, which then finds what the independence hides."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from calibrate.search.space import SearchSpace
from calibrate.search.units import Genome

GRID = 1 << 14
"""Most steps that the limit is divided into. Costs are whole numbers of steps if they have a common divisor that allows it,
as layers of powers of two have; otherwise they are rounded up, so that what is found always fits."""


def least_penalty(space: SearchSpace, penalties: Sequence[Mapping[int, float]], grid: int = GRID) -> Genome | None:
    """The genome of least summed penalty that the budget allows, up to the rounding of costs to the grid.

    Args:
        penalties: penalties[unit][width]; a unit takes one of the widths that it has a penalty for.

    Returns:
        The genome; None if no choice of the given widths fits.
    """
    # Costs beyond the cheapest choice of each unit: only differences need the grid.
    cheapest = [min(space.unit_cost(unit, width) for width in row) for unit, row in enumerate(penalties)]
    room = space.limit - sum(cheapest)
    if room < 0:
        return None
    extras = [
        {width: space.unit_cost(unit, width) - cheapest[unit] for width in sorted(row)} for unit, row in enumerate(penalties)
    ]
    step = math.gcd(*(extra for row in extras for extra in row.values())) or 1
    step = max(step, -(-room // grid))
    last = room // step
    best = np.zeros(last + 1)
    """Least penalty of the units so far for at most so many steps."""
    taken: list[np.ndarray] = []
    for unit, row in enumerate(extras):
        options = np.full((len(row), last + 1), math.inf)
        for index, (width, extra) in enumerate(row.items()):
            steps = -(-extra // step)
            if steps <= last:
                options[index, steps:] = best[: last + 1 - steps] + penalties[unit][width]
        taken.append(options.argmin(axis=0).astype(np.int8))
        best = options.min(axis=0)
    genome: list[int] = []
    position = last
    for row, choice in zip(reversed(extras), reversed(taken), strict=True):
        width, extra = list(row.items())[choice[position]]
        genome.append(width)
        position -= -(-extra // step)
    return tuple(reversed(genome))
