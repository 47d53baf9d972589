"""How much each unit's width matters on its own, measured around one genome; and what that predicts of other genomes."""

from collections.abc import Iterator, Mapping, Sequence
from random import Random

from calibrate.search.evolution import Fitness
from calibrate.search.knapsack import least_penalty
from calibrate.search.space import SearchSpace
from calibrate.search.units import Genome

Penalties = Sequence[Mapping[int, float]]
"""penalties[unit][width]: change of the fitness when that unit alone is read at that width."""


class Sensitivity:
    """Penalties of single steps from ``base``: every unit, alone, a step narrower and a step wider.

    Args:
        windows: indices of the windows to measure on.
    """

    def __init__(self, base: Genome, space: SearchSpace, fitness: Fitness, windows: Sequence[int]):
        self._base = base
        self._space = space
        self._fitness = fitness
        self._windows = windows
        self._widths = [
            [width for width in (space.narrower(unit, held), space.wider(unit, held)) if width is not None]
            for unit, held in enumerate(base)
        ]
        self.penalties = self._penalties(windows)

    def predict(self, genome: Genome) -> float:
        """Change of the fitness from the base to ``genome`` if units did not depend on each other.

        Beyond the widths measured, the error of a unit is taken to fall by 4 with every bit, as that of a quantizer does.
        """
        return sum(_extrapolated(row, held, width) for row, held, width in zip(self.penalties, self._base, genome, strict=True))

    def best_genomes(self, count: int, random: Random) -> Iterator[Genome]:
        """The genome that the penalties make best within the budget, then ``count`` for as many draws of a few windows.

        A few windows measure what all do with more noise: where that changes the ranking of units, the genomes differ.
        """
        few = max(1, len(self._windows) // 4)
        for draw in range(count + 1):
            penalties = self._penalties(random.choices(self._windows, k=few)) if draw else self.penalties
            genome = least_penalty(self._space, penalties)
            if genome is not None:
                # The knapsack rounds costs up, which may leave room.
                yield self._space.widened(genome, range(self._space.num_units))

    def _penalties(self, windows: Sequence[int]) -> Penalties:
        reference = self._fitness(self._base, windows)
        rows: list[Mapping[int, float]] = []
        for unit, (held, widths) in enumerate(zip(self._base, self._widths, strict=True)):
            changed = {width: (*self._base[:unit], width, *self._base[unit + 1 :]) for width in widths}
            measured = {width: self._fitness(genome, windows) - reference for width, genome in changed.items()}
            rows.append({held: 0.0, **measured})
        return rows


def _extrapolated(row: Mapping[int, float], held: int, width: int) -> float:
    if width in row:
        return row[width]
    side = [measured for measured in row if measured != held and (measured < held) == (width < held)]
    if not side:
        return 0.0
    return row[side[0]] * (0.25**width - 0.25**held) / (0.25 ** side[0] - 0.25**held)
