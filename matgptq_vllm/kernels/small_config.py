"""When and how the product for few rows that shares x (kernels.small) runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.digits_ptx import takes_digits
from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, UNIT_N, padded
from matgptq_vllm.kernels.wide_config import wide_runs

SMALL_TO = 16
"""Rows up to which it can run."""

ROW_ROOMS = (1, 4, 8, 16)
"""Ranges of M, by their largest, each of which has a configuration of its own."""

_WINS = (range(2, 5), range(9, SMALL_TO + 1))
"""Rows at which narrow widths alone are faster here than in kernels.gemm, by measurement: 5 to 8 rows are not."""

NUM_WARPS = 8
MANY_TILES = 8
"""Per multiprocessor: then programs have more tiles side by side, and fewer warps share one."""

LONG_UNITS = 64
"""Units of K; with more, likewise."""

_PROGRAMS = {1: 3.0, 4: 3.0, 8: 3.0, 16: 2.5}
"""Rows -> programs per multiprocessor, up to which K is split."""

_SHARED_BYTES = {1: 74_000, 4: 74_000, 8: 74_000, 16: 64_000}
"""Rows -> shared memory for x, at most, so that two or three programs fit."""

_REGISTERS = {1: 80, 4: 96, 8: 96, 16: 128}

_DEPTHS = {2: 4, 3: 4, 4: 4, 6: 2, 8: 2}


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

    programs: int | None = None
    """Programs per part of K; each takes turns, if there are more tiles than they have. None: as many as that takes one."""

    max_registers: int | None = None
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


def small_runs(device: torch.device, m: int, widths: Sequence[int], rule: SliceRule) -> bool:
    """Whether it runs on ``device``, and is worth it for ``m`` rows in a replica that holds ``widths``.

    Digits make narrow widths faster, but what else the replica holds is slower here than in kernels.gemm from 2 rows on.
    """
    if not takes_digits(widths[0], rule):
        return False
    wins = m == 1 or (takes_digits(widths[-1], rule) and any(m in rows for rows in _WINS))
    return wins and wide_runs(device)


@lru_cache(maxsize=4096)
def small_config(m: int, n: int, k: int, num_sms: int) -> SmallConfig:
    """The configuration for ``m`` rows, at most SMALL_TO; it is the same within a range of ROW_ROOMS."""
    rows = next(room for room in ROW_ROOMS if m <= room)
    num_tiles, units = padded(n, PAD_N) // UNIT_N, padded(k, UNIT_K) // UNIT_K
    tiles = _tiles(rows, num_tiles >= MANY_TILES * num_sms or units > LONG_UNITS)
    while num_tiles % tiles:
        tiles //= 2
    shares, groups, split = NUM_WARPS // tiles, num_tiles // tiles, 1
    while split * 2 * shares <= units and (
        split * 2 * groups <= _PROGRAMS[rows] * num_sms or -(-units // split) * bytes_of_unit(rows) > _SHARED_BYTES[rows]
    ):
        split *= 2
    programs = None
    if rows > 1:
        # Programs that run at once take turns, so that they make x ready only once.
        turns = -(-groups // max(2 * num_sms // split, 1))
        programs = -(-groups // turns)
    depths = tuple(_depth(depth, units, split * shares) for depth in _DEPTHS.values())
    return SmallConfig(rows, tiles, shares, split, programs, _REGISTERS[rows], depths=depths)


def bytes_of_unit(rows: int) -> int:
    """Shared memory that x of a unit takes, as kernels.small_x has it."""
    return rows * 2 * UNIT_K + 4 * (4 if rows == 1 else max(rows, 8)) + (8 * UNIT_K if rows == 1 else 0)


def _tiles(rows: int, more: bool) -> int:
    """Tiles side by side: the more, the less often x is made ready."""
    if rows == max(ROW_ROOMS):
        return NUM_WARPS
    return {1: 1, 4: 2, 8: 4}[rows] * (2 if more and rows < 8 else 1)


def _depth(depth: int, units: int, warps: int) -> int:
    """``depth``, or less if then all warps have whole steps."""
    return next((less for less in (4, 2, 1) if less <= depth and units % (warps * less) == 0), depth)
