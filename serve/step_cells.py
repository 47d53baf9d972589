"""What is remembered of steps: a mean per kind of step, so that an hour of small batches does not wash away large ones."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from serve.step_columns import BASE
from serve.stored_numbers import count_of, numbers_of

CELL_STEPS = 16
"""Steps after which a cell counts in full."""

MEMORY_STEPS = 128
"""Steps that a cell's mean remembers. Changes of the machine's speed are followed faster (``serve.latency_model``)."""

MAX_CELLS = 128
"""Cells kept; the one that has not been met for longest is dropped."""

FIRST_STEPS = 3
"""Steps of which a cell remembers each: they count by their median, so that one that a pause made long is not believed."""

STALE_STEPS = 2000
"""Steps after which a cell that was not met counts half; it never counts less than STALE_WEIGHT."""

STALE_WEIGHT = 1 / 16

Key = tuple[int, int, int]


@dataclass
class Cell:
    """Mean of like steps."""

    features: dict[int, float]
    """By column (``serve.step_columns``)."""

    ms: float
    count: int
    met: int
    """Number of the latest step that it was met in."""

    first: list[float] = field(default_factory=list)
    """Milliseconds of its first steps, while they are few."""

    @property
    def known(self) -> bool:
        """Whether it has been met often enough to tell an outlier."""
        return self.count >= FIRST_STEPS

    def add(self, features: Mapping[int, float], ms: float, step: int) -> None:
        """Take in one more step."""
        self.count += 1
        rate = 1 / min(self.count, MEMORY_STEPS)
        for column in self.features.keys() | features.keys():
            old = self.features.get(column, 0.0)
            self.features[column] = old + rate * (features.get(column, 0.0) - old)
        if self.count <= FIRST_STEPS:
            self.first.append(ms)
            self.ms = median(self.first)
        else:
            self.ms += rate * (ms - self.ms)
        self.met = step

    def weight(self, step: int) -> float:
        """What it counts for at ``step``, at most 1."""
        age = (step - self.met) / STALE_STEPS
        return max(STALE_WEIGHT, 0.5**age) * min(self.count, CELL_STEPS) / CELL_STEPS


class StepCells:
    """The latest MAX_CELLS kinds of steps."""

    def __init__(self) -> None:
        self._cells: OrderedDict[Key, Cell] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells.values())

    def get(self, key: Key) -> Cell | None:
        """What is known of steps like ``key``."""
        return self._cells.get(key)

    def add(self, key: Key, features: dict[int, float], ms: float, step: int) -> None:
        """Take in step number ``step``."""
        cell = self._cells.get(key)
        if cell is None:
            self._cells[key] = Cell(features, ms, 1, step, [ms])
            if len(self._cells) > MAX_CELLS:
                self._cells.popitem(last=False)
        else:
            cell.add(features, ms, step)
            self._cells.move_to_end(key)

    def to_json(self) -> list[dict[str, Any]]:
        """All cells, the one longest not met first."""
        return [
            {
                "key": list(key),
                "features": [[column, value] for column, value in sorted(cell.features.items())],
                "ms": cell.ms,
                "count": cell.count,
                "met": cell.met,
            }
            for key, cell in self._cells.items()
        ]

    @classmethod
    def of(cls, document: Any, columns: int, steps: int) -> "StepCells":
        """The cells that ``to_json`` described.

        Args:
            columns: how many there are.
            steps: how many were observed.

        Raises:
            KeyError, TypeError, ValueError: it describes none.
        """
        found = cls()
        for entry in document:
            presence, decode, prefill = (count_of(part) for part in entry["key"])
            names, values = zip(*entry["features"], strict=True)
            features = dict(zip(map(count_of, names), numbers_of(values), strict=True))
            (ms,) = numbers_of([entry["ms"]])
            count = count_of(entry["count"])
            cell = Cell(features, ms, count, count_of(entry["met"]), [ms] * min(count, FIRST_STEPS))
            if features.get(BASE) != 1 or max(features) >= columns or ms <= 0 or not cell.count or cell.met > steps:
                raise ValueError(f"a cell is impossible: {entry}")
            found._cells[presence, decode, prefill] = cell
        if len(found) > MAX_CELLS or bool(found._cells) != bool(steps):
            raise ValueError(f"it has {len(found)} cells of {steps} steps")
        return found
