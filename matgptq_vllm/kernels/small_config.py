"""When and how the product for few rows that shares x (kernels.small) runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, UNIT_N, padded

SMALL_TO = 16
"""Rows up to which it runs."""

CAPABILITY_MAJOR = 9


@dataclass(frozen=True)
class SmallConfig:
    """One way to run the product for few rows. Any is right for any shape; they differ in speed only."""

    rows: int
    """Rows that a program has room for: 1, 4, 8 or 16."""

    tiles: int
    """Warps side by side, each with its own tiles of 16 outputs."""

    shares: int
    """Warps that share tiles, unit by unit of K; their sums are added in order."""

    split_k: int
    """Programs that share tiles, each with a part of K; their sums are added in order."""

    programs: int | None = None
    """Programs per part of K; each takes its turns, if there are more tiles than they have. None: as many as that takes one."""

    max_registers: int | None = None
    """Registers per thread, at most."""

    pdl: bool = True
    """Whether the kernel may start before the one before it ends."""

    depths: tuple[int, ...] = (4, 4, 4, 2, 2)
    """Units that a warp reads ahead where all rows have one width, per width: 1, 2 or 4."""

    @property
    def num_warps(self) -> int:
        return self.tiles * self.shares

    def depths_of(self, widths: Sequence[int]) -> tuple[int, ...]:
        """Of the widths that a replica holds."""
        return tuple(self.depths[WIDTHS.index(width)] for width in widths)
