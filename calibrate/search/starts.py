"""Profiles to begin with that need no measurement: uniform widths, and linear mixes of neighbouring ones."""

from calibrate.search.space import SearchSpace
from calibrate.search.units import Genome


def plain_starts(space: SearchSpace) -> list[Genome]:
    """The widest uniform profile that the budget allows; then that one with the rest of the budget spent on widening the
    first units, the last ones, and units spread evenly. Where no uniform profile fits, they begin from the cheapest one."""
    width = space.widest_uniform
    base = space.cheapest if width is None else (width,) * space.num_units
    units = range(space.num_units)
    orders = [list(units), list(reversed(units)), sorted(units, key=_bit_reversed)]
    return list(dict.fromkeys([base, *(space.widened(base, order) for order in orders)]))


def _bit_reversed(index: int) -> int:
    return int(f"{index:032b}"[::-1], 2)
