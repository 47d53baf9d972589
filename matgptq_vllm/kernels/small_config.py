"""When and how the product for few rows that shares x (kernels.small) runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.digits_ptx import takes_digits
from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, UNIT_N, padded

SMALL_TO = 16
"""Rows up to which it is always preferred."""

ROW_ROOMS = (1, 4, 8, 16, 32)
"""Ranges of M, by their largest, each of which has a configuration of its own."""

FEW_UNITS = 8
"""Units of K that a program multiplies, at most, for it to be preferred for more than SMALL_TO rows."""

NUM_WARPS = 8

PROGRAMS = 2
"""Per multiprocessor at once: as many as fit with 128 registers per thread."""

MAX_REGISTERS = 128

UNITS = {1: 64, 4: 32, 8: 14, 16: 14, 32: 7}
"""Rows -> units of K that a program makes ready, at most: meanwhile no weights are read."""

_ADDING = {1: 1.0, 4: 0.15, 8: 0.15, 16: 0.15, 32: 0.15}
"""Rows -> by how much longer programs take that take turns and share K, as sums have to be added up: measured for 4 to 16 rows.
A single row's programs never do both."""

_DEPTHS = {2: 4, 3: 4, 4: 4, 6: 2, 8: 2}
_DEEP_UNITS = 16
"""Units per warp from which on more than 2 are read ahead."""


@dataclass(frozen=True)
class SmallConfig:
    """One way to run the product for few rows. Any is right for any shape; they differ in speed only."""

    rows: int
    """Rows that a program has room for: one of ROW_ROOMS."""

    tiles: int
    """Warps side by side, each with its own tile of 16 outputs; times 16 a divisor of the padded outputs."""

    shares: int
    """Warps that share a tile, unit by unit of K; their sums are added in order."""

    split_k: int
    """Programs that share tiles, each with a part of K; their sums are added in order."""

    programs: int
    """Programs per part of K; each takes turns, if there are more tiles than they have."""

    max_registers: int = MAX_REGISTERS
    """Registers per thread, at most."""

    pdl: bool = True
    """Whether the kernel may start before the one before it ends."""

    depths: tuple[int, ...] = tuple(_DEPTHS.values())
    """Units that a warp reads ahead where all rows have one width, per width."""

    @property
    def num_warps(self) -> int:
        return self.tiles * self.shares

    def turns(self, n: int) -> int:
        """The most turns that a program takes, of a layer of ``n`` outputs."""
        return -(-(padded(n, PAD_N) // UNIT_N // self.tiles) // self.programs)

    def depths_of(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Of the widths that a replica holds."""
        return tuple(self.depths[WIDTHS.index(width)] for width in widths)


def prefers_small(m: int, n: int, k: int, widths: Sequence[int], rule: SliceRule, num_sms: int) -> bool:
    """Whether it is faster than the wide product, where both run (kernels.wide_config).

    For more than SMALL_TO rows that is so where there is little to do, for rows of one width that are multiplied as numbers.
    """
    if m <= SMALL_TO:
        return True
    if m > ROW_ROOMS[-1] or len(widths) > 1 or takes_digits(widths[0], rule, False):
        return False
    config = small_config(m, n, k, num_sms)
    return config.turns(n) * -(-(padded(k, UNIT_K) // UNIT_K) // config.split_k) <= FEW_UNITS


@lru_cache(maxsize=4096)
def small_config(m: int, n: int, k: int, num_sms: int) -> SmallConfig:
    """The configuration for ``m`` rows, at most the last of ROW_ROOMS; it is the same within a range of them.

    All programs run at once. Those of a single row share no tiles: that costs more than to make more of x ready.
    """
    rows = next(room for room in ROW_ROOMS if m <= room)
    num_tiles, units, at_once = padded(n, PAD_N) // UNIT_N, padded(k, UNIT_K) // UNIT_K, PROGRAMS * num_sms
    tiles = NUM_WARPS
    if rows == 1 and units <= UNITS[rows]:
        tiles = next((few for few in (1, 2, 4) if num_tiles <= few * at_once), NUM_WARPS)
    while num_tiles % tiles:
        tiles //= 2
    shares, groups = NUM_WARPS // tiles, num_tiles // tiles

    def turns(split: int) -> int:
        return -(-groups // max(at_once // split, 1))

    def length(split: int) -> float:
        return turns(split) / split * (1 + (_ADDING[rows] if split > 1 and turns(split) > 1 else 0))

    splits = [1 << bit for bit in range(max(units // shares, 1).bit_length())]
    ready = [split for split in splits if -(-units // split) <= UNITS[rows]]
    split = min(ready, key=length) if ready else splits[-1]
    depths = tuple(_depth(depth, rows, units, split * shares) for depth in _DEPTHS.values())
    return SmallConfig(rows, tiles, shares, split, -(-groups // turns(split)), depths=depths)


def _depth(depth: int, rows: int, units: int, warps: int) -> int:
    """``depth``, or less if then all warps have whole steps."""
    most = depth if units // warps >= _DEEP_UNITS and rows <= SMALL_TO else 2
    return next((less for less in (4, 2, 1) if less <= most and units % (warps * less) == 0), most)
