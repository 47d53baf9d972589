"""When and how the product for few rows that shares x (kernels.small) runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, UNIT_N, padded
from matgptq_vllm.kernels.wide_config import wide_runs

SMALL_TO = 16
"""Rows up to which it can run."""

ROW_ROOMS = (1, 4, 8, 16)
"""Ranges of M, by their largest, each of which has a configuration of its own."""

NUM_WARPS = 8

PROGRAMS = 2
"""Per multiprocessor at once: as many as fit with 128 registers per thread."""

MAX_REGISTERS = 128

UNITS = {1: 64, 4: 16, 8: 14, 16: 14}
"""Rows -> units of K that a program makes ready, at most: meanwhile no weights are read."""

UNITS_OF_TURNS = {1: 64, 4: 16, 8: 4, 16: 4}
"""The same of programs that take turns anyway, up to SPLIT_FOR_TURNS parts of K, whose sums have to be added up."""

SPLIT_FOR_TURNS = 8

_DEPTHS = {2: 4, 3: 4, 4: 4, 6: 2, 8: 2}
_DEEP_UNITS = 16
"""Units per warp from which on more than 2 are read ahead."""


@dataclass(frozen=True)
class SmallConfig:
    """One way to run the product for few rows. Any is right for any shape; they differ in speed only."""

    rows: int
    """Rows that a program has room for: 1, 4, 8 or 16."""

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

    def depths_of(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Of the widths that a replica holds."""
        return tuple(self.depths[WIDTHS.index(width)] for width in widths)


def small_runs(device: torch.device, m: int) -> bool:
    """Whether it runs on ``device``, for ``m`` rows."""
    return m <= SMALL_TO and wide_runs(device)


@lru_cache(maxsize=4096)
def small_config(m: int, n: int, k: int, num_sms: int) -> SmallConfig:
    """The configuration for ``m`` rows, at most SMALL_TO; it is the same within a range of ROW_ROOMS.

    All programs run at once. Those of a single row share no tiles: that costs more than to make more of x ready.
    """
    rows = next(room for room in ROW_ROOMS if m <= room)
    num_tiles, units, at_once = padded(n, PAD_N) // UNIT_N, padded(k, UNIT_K) // UNIT_K, PROGRAMS * num_sms
    tiles = NUM_WARPS
    if rows == 1 and units <= UNITS[rows]:
        tiles = next((few for few in (1, 2, 4) if num_tiles <= few * at_once), NUM_WARPS)
    while num_tiles % tiles:
        tiles //= 2
    shares, groups, split = NUM_WARPS // tiles, num_tiles // tiles, 1
    while split * 2 * shares <= units:
        most = (UNITS if split * groups <= at_once or split >= SPLIT_FOR_TURNS else UNITS_OF_TURNS)[rows]
        if split * 2 * groups > at_once and -(-units // split) <= most:
            break
        split *= 2
    turns = -(-groups * split // at_once)
    depths = tuple(_depth(depth, units, split * shares) for depth in _DEPTHS.values())
    return SmallConfig(rows, tiles, shares, split, -(-groups // turns), depths=depths)


def _depth(depth: int, units: int, warps: int) -> int:
    """``depth``, or less if then all warps have whole steps."""
    most = depth if units // warps >= _DEEP_UNITS else 2
    return next((less for less in (4, 2, 1) if less <= most and units % (warps * less) == 0), most)
