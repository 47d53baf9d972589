"""What a parent's units cost at every width, in the currency of a budget: the search space of that budget."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from calibrate.search.budget import PICOSECONDS, TIME_UNITS, Budget
from calibrate.search.space import SearchSpace
from calibrate.search.units import Genome, Unit, genome_profile
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.storage import profile_bytes

Times = Mapping[tuple[int, int], Mapping[int, Fraction]]
"""(N, K) of a matrix product -> width -> picoseconds."""


@dataclass(frozen=True)
class PricedSpace:
    """A search space, and the way back from its costs to the budget's currency."""

    space: SearchSpace
    budget: Budget
    floor: int
    """Cost that no choice of widths changes, such as the bytes of scales."""

    scale: int
    """Number of costs in one of the budget's amount: all weights for bits, else 1."""

    def amount(self, genome: Genome) -> str:
        """What ``genome`` costs, in the budget's unit."""
        return self.budget.shown(Fraction(self.space.cost(genome) + self.floor, self.scale))


def price(
    reader: ParentReader, units: Sequence[Unit], budget: Budget, times: Times | None, bandwidth: Fraction | None
) -> PricedSpace:
    """The search space of ``budget``.

    Args:
        times: of one decode step, by shape and width; only for a budget of time, where it is preferred to ``bandwidth``.
        bandwidth: bytes per second at which weights are read.

    Raises:
        InputError: a budget of time with neither times nor bandwidth, a shape or width without a time, a budget that
            nothing meets, or one that everything meets.
    """
    floor, scale = 0, 1
    if budget.kind == "bits":
        scale = sum(reader.num_weights.values())
        table = [[width * unit.shape[0] * unit.shape[1] for width in WIDTHS] for unit in units]
    elif budget.kind == "bytes" or times is None:
        floor, table = _bytes(reader, units)
    else:
        table = [[_time(times, unit, width) for width in WIDTHS] for unit in units]
    if budget.kind == "time" and times is None:
        if bandwidth is None:
            raise InputError(
                f"budget {budget.text} is a time, which needs --times FILE (measured microseconds per layer and width) "
                "or --bandwidth (bytes per second, such as 4.0TB/s)"
            )
        # Rounded once, upwards, so that a sum of costs never promises less time than its bytes take.
        picoseconds = [[-(-cost * PICOSECONDS // bandwidth) for cost in costs] for costs in table]
        floor, table = int(-(-floor * PICOSECONDS // bandwidth)), [[int(cost) for cost in costs] for costs in picoseconds]
    limit = budget.amount * scale - floor
    space = SearchSpace(tuple(map(tuple, table)), limit.numerator // limit.denominator)
    priced = PricedSpace(space, budget, floor, scale)
    _check_reachable(priced)
    return priced


def read_times(path: Path) -> Times:
    """Times of matrix products: a JSON file ``{"NxK": {"width": microseconds}}``.

    Raises:
        InputError: it cannot be read, or is not of that form.
    """
    form = 'it must be {"NxK": {"width": microseconds}}, such as {"4096x4096": {"2": 5.1, "3": 6.0}}'
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); {form}") from error
    try:
        return {
            _shape(key): {int(width): Fraction(time) * TIME_UNITS["us"] for width, time in row.items()}
            for key, row in document.items()
        }
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is not a table of times ({error}); {form}") from error


def _check_reachable(priced: PricedSpace) -> None:
    space, budget = priced.space, priced.budget
    if not space.fits(space.cheapest):
        least = Fraction(space.cost(space.cheapest) + priced.floor, priced.scale)
        raise InputError(
            f"no profile meets a budget of {budget}: the smallest possible is "
            f"{budget.shown(least, upwards=True)}; give at least that"
        )
    if space.fits(space.widest):
        raise InputError(
            f"a budget of {budget} lets every layer be read at width {WIDTHS[-1]} ({priced.amount(space.widest)}): "
            f"serve the uniform profile {WIDTHS[-1]}, or give a smaller budget"
        )


def _bytes(reader: ParentReader, units: Sequence[Unit]) -> tuple[int, list[list[int]]]:
    """Bytes of everything at the narrowest width, and what each unit adds to them at every width.

    From differences of whole profiles: ``core.storage`` alone knows what a width reads.
    """
    narrow = [WIDTHS[0]] * len(units)

    def total(genome: Sequence[int]) -> int:
        return profile_bytes(reader, genome_profile("priced", units, tuple(genome)))

    floor = total(narrow)
    table = []
    for index in range(len(units)):
        table.append([total([*narrow[:index], width, *narrow[index + 1 :]]) - floor for width in WIDTHS])
    return floor, table


def _time(times: Times, unit: Unit, width: int) -> int:
    n, k = unit.shape
    try:
        time = times[unit.shape][width]
    except KeyError:
        held = ", ".join(f"{n}x{k}" for n, k in times) or "nothing"
        raise InputError(
            f"--times has no time of {n}x{k} (outputs x inputs of {' + '.join(unit.layers)}) at width {width}; it has {held}. "
            f"Measure every product of the model at the widths {', '.join(map(str, WIDTHS))}"
        ) from None
    if time <= 0:
        raise InputError(f"--times: the time of {n}x{k} at width {width} is not above 0; measure it again")
    return round(time)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)
