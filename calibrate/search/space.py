"""The profiles that a budget allows: what every unit costs at every width, and the limit on the sum. Pure integers.

A width is *efficient* for a unit if every wider width costs more. Search moves along efficient widths only: where width 8
costs no more than width 6, as under the slice rule ``round`` or by a table of kernel times, 6 is passed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from calibrate.search.units import Genome
from matgptq_vllm.core.precision import WIDTHS


@dataclass(frozen=True)
class SearchSpace:
    """Costs and limit, in whole units of whatever is bounded: bits, bytes or picoseconds."""

    costs: tuple[tuple[int, ...], ...]
    """costs[unit][index of the width in WIDTHS]; at least 0."""

    limit: int
    """Largest sum of costs that the budget allows."""

    @property
    def num_units(self) -> int:
        """Length of a genome."""
        return len(self.costs)

    @cached_property
    def efficient(self) -> tuple[tuple[int, ...], ...]:
        """Efficient widths of every unit, ascending; their costs ascend strictly. The widest width is always one."""
        return tuple(tuple(_efficient(costs)) for costs in self.costs)

    @property
    def cheapest(self) -> Genome:
        """The genome of least cost."""
        return tuple(widths[0] for widths in self.efficient)

    @property
    def widest(self) -> Genome:
        """The genome of the widest width everywhere."""
        return (WIDTHS[-1],) * self.num_units

    @property
    def widest_uniform(self) -> int | None:
        """Widest width that fits everywhere at once; None if the budget allows no uniform profile."""
        fitting = [width for width in WIDTHS if self.fits((width,) * self.num_units)]
        return fitting[-1] if fitting else None

    def unit_cost(self, unit: int, width: int) -> int:
        """Cost of one unit at ``width``."""
        return self.costs[unit][WIDTHS.index(width)]

    def cost(self, genome: Genome) -> int:
        """Cost of a genome."""
        return sum(self.unit_cost(unit, width) for unit, width in enumerate(genome))

    def fits(self, genome: Genome) -> bool:
        """Whether the budget allows ``genome``."""
        return self.cost(genome) <= self.limit

    def wider(self, unit: int, width: int) -> int | None:
        """Next efficient width of ``unit`` above ``width``; None if there is none."""
        return next((candidate for candidate in self.efficient[unit] if candidate > width), None)

    def narrower(self, unit: int, width: int) -> int | None:
        """Next efficient width of ``unit`` below ``width``; None if there is none."""
        return next((candidate for candidate in reversed(self.efficient[unit]) if candidate < width), None)

    def lifted(self, genome: Genome) -> Genome:
        """``genome`` with each width replaced by the next efficient one that is not narrower; it costs no more."""
        return tuple(
            next(candidate for candidate in self.efficient[unit] if candidate >= width) for unit, width in enumerate(genome)
        )

    def widened(self, genome: Genome, order: Sequence[int]) -> Genome:
        """``genome`` with its units widened by one step each, in the given order, wherever that fits."""
        widths, left = list(genome), self.limit - self.cost(genome)
        for unit in order:
            wider = self.wider(unit, widths[unit])
            if wider is not None:
                extra = self.unit_cost(unit, wider) - self.unit_cost(unit, widths[unit])
                if extra <= left:
                    widths[unit], left = wider, left - extra
        return tuple(widths)


def _efficient(costs: Sequence[int]) -> list[int]:
    found: list[int] = []
    least: int | None = None
    for width, cost in zip(reversed(WIDTHS), reversed(costs), strict=True):
        if least is None or cost < least:
            found.append(width)
            least = cost
    return found[::-1]
