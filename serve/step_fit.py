"""Coefficients that explain what is remembered of steps: least squares of relative errors, none negative.

What no cell tells of a profile is taken from its neighbours by bits per weight.
"""

from collections.abc import Sequence

from serve.step_cells import StepCells
from serve.step_columns import BASE, StepColumns

SWEEPS = 10
"""Sweeps of coordinate descent per fit; each fit starts from the last one."""

PRIOR = 0.02
"""Weight of what neighbours tell, in cells."""

TYPICAL_TOKENS = {"fixed": 1.0, "decode": 8.0, "prefill": 256.0}
"""Work at which PRIOR weighs the kinds of cost alike."""

TYPICAL_CONTEXT = 4096.0


class StepFit:
    """The coefficients, and how they follow from cells.

    Args:
        bits: read per weight by each profile, narrow to wide.
    """

    def __init__(self, columns: StepColumns, bits: Sequence[float]) -> None:
        self.coefficients = [0.0] * len(columns)
        """Milliseconds per unit of each column."""

        self._columns = columns
        self._bits = bits

    def fit(self, cells: StepCells, step: int) -> None:
        """Explain ``cells`` as they count at ``step``, by coordinate descent from the present coefficients."""
        coefficients = self.coefficients
        size = len(coefficients)
        gram = [[0.0] * size for _ in range(size)]
        target = [0.0] * size
        inverse_square = total = 0.0
        for cell in cells:
            weight = cell.weight(step) / cell.ms**2
            total += weight * cell.ms**2
            inverse_square += weight
            items = list(cell.features.items())
            for column, value in items:
                scaled = weight * value
                row = gram[column]
                for other, factor in items:
                    row[other] += scaled * factor
                target[column] += scaled * cell.ms
        # Milliseconds squared to relative errors squared, and all priors scaled as the observations are.
        prior = PRIOR * min(1.0, total) * inverse_square / total
        context = self._columns.context
        for _ in range(SWEEPS):
            self._descend(gram, target, BASE, prior, 0.0)
            self._descend(gram, target, self._columns.prompts, prior, 0.0)
            self._descend(gram, target, context, prior * TYPICAL_CONTEXT**2, 0.0)
            for kind, first in self._columns.first.items():
                known = [index for index in range(len(self._bits)) if gram[first + index][first + index] > 0]
                strength = prior * TYPICAL_TOKENS[kind] ** 2
                for index in range(len(self._bits)):
                    neighbours = self._from_neighbours(kind, index, [other for other in known if other != index])
                    if gram[first + index][first + index] > 0:
                        self._descend(gram, target, first + index, strength, neighbours)
                    else:
                        coefficients[first + index] = neighbours

    def _descend(
        self, gram: Sequence[Sequence[float]], target: Sequence[float], column: int, weight: float, mean: float
    ) -> None:
        row = gram[column]
        coefficients = self.coefficients
        rest = sum(map(float.__mul__, row, coefficients)) - row[column] * coefficients[column]
        coefficients[column] = max(0.0, (target[column] - rest + weight * mean) / (row[column] + weight))

    def _from_neighbours(self, kind: str, index: int, known: Sequence[int]) -> float:
        """What profiles with evidence tell of another one's cost: linear in bits between two of them; outside, the fixed
        cost is taken in proportion to the bits (weights are read) and costs per token are taken as they are."""
        first = self._columns.first[kind]
        bits = self._bits
        below = max((other for other in known if other < index), default=None)
        above = min((other for other in known if other > index), default=None)
        if below is None and above is None:
            return 0.0
        if below is not None and above is not None and bits[above] > bits[below]:
            part = (bits[index] - bits[below]) / (bits[above] - bits[below])
            low, high = self.coefficients[first + below], self.coefficients[first + above]
            return low + part * (high - low)
        nearest = above if below is None else below
        assert nearest is not None
        value = self.coefficients[first + nearest]
        return value * bits[index] / bits[nearest] if kind == "fixed" else value
