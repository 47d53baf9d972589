"""When and how the wide product (kernels.wide) runs."""

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

from matgptq_vllm.kernels.layout import UNIT_K, UNIT_N, padded

WIDE_FROM = 17
"""Rows from which it is faster than the products for few rows."""

WIDE_TO = 1024
"""Rows up to which it is better, where rows have several widths, than products of one width at a time: those take the host
longer than the GPU."""

CAPABILITY_MAJOR = 9
"""Hopper: the only GPUs with its tensor core instructions (wgmma)."""

WARPS = 4
"""Of a warpgroup, which is who multiplies and who copies."""

GROUPS = 2
"""Warpgroups of a program that multiply, each 64 * tiles outputs. One more brings what they need."""

REGISTERS = (232, 40)
"""Per thread of the second of them, and of the one that brings; the first has what is left, 232 too."""

MAX_SPLIT = 8

_EQUAL_SHARES = 20.0
"""What starts, ends and hand-overs of programs with equal shares take, in units of K: 13 at 32 rows, 20 from 64 on, when also
clocks are lower as no multiprocessor is idle (docs/kernels.md)."""


@dataclass(frozen=True)
class WideConfig:
    """One way to run the wide product. Any is right for any shape; they differ in speed only."""

    block_m: int
    """Rows per program: 16, 32, 64, 128 or 256, which needs 1 tile."""

    split_k: int
    """Programs that share one tile, each with a part of K; their sums are added in order."""

    tiles: int = 2
    """Units of 16 outputs per warp: 1 or 2."""

    stages: int = 4
    """Units of K whose words shared memory has room for."""

    halves: int = 8
    """Halves of units whose x it has room for. If twice ``stages``, x and words of a unit come and go together: fewer waits."""

    programs: int = 0
    """If not 0: as many programs have equal shares of all tiles (kernels.wide_stream), instead of a split K. For rows of one
    width, and as many tiles or more."""

    pdl: bool = True
    """Whether the kernel may start before the one before it ends."""

    @property
    def block_n(self) -> int:
        """Outputs per program."""
        return UNIT_N * WARPS * self.tiles * GROUPS


class Way(NamedTuple):
    """A configuration that does not split K yet, and times by measurement, in units of K of the first way of its rows."""

    config: WideConfig

    unit: float = 1.0
    """What a unit takes."""

    ends: float = 5.0
    """What a program's start and end take."""

    sharing: float = 3.0
    """What adding up the shares of a tile takes."""

    def length(self, row_tiles: int, n: int, units: int, split: int, num_sms: int) -> float:
        """Time of a product whose K, of so many units, is split."""
        rounds = -(-row_tiles * -(-n // self.config.block_n) * split // num_sms)
        return rounds * (-(-units // split) * self.unit + self.ends + (self.sharing if split > 1 else 0.0))


WAYS = {
    32: (Way(WideConfig(32, 1)), Way(WideConfig(32, 1, tiles=1), 0.55, 5.5, 1.5)),
    64: (Way(WideConfig(64, 1)), Way(WideConfig(64, 1, tiles=1), 0.5, 4.0, 1.5)),
    128: (Way(WideConfig(128, 1, stages=3, halves=7)), Way(WideConfig(128, 1, tiles=1), 0.5, 4.0, 1.5)),
    256: (Way(WideConfig(256, 1, tiles=1, halves=5)),),
}
"""By the range of M. Tiles of half as many outputs take fewer programs per tile, whose sums are added up sooner."""


@lru_cache(maxsize=16)
def wide_runs(device: torch.device) -> bool:
    """Whether ``device`` and the installed Triton can run the wide product."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return (
        torch.cuda.get_device_capability(device)[0] == CAPABILITY_MAJOR and find_spec("triton.experimental.gluon") is not None
    )


@lru_cache(maxsize=4096)
def wide_config(bucket: int, n: int, k: int, num_sms: int, one_width: bool) -> WideConfig:
    """The configuration for a range of M (kernels.tables.bucket) and a layer of ``n`` outputs and ``k`` inputs.

    K is split, or programs have equal shares of all tiles, such that programs, of which each multiprocessor runs one at a time,
    are done soonest.

    Args:
        one_width: whether all rows have one width.
    """
    ways = WAYS[min(max(bucket, min(WAYS)), max(WAYS))]
    row_tiles, units = -(-bucket // ways[0].config.block_m), padded(k, UNIT_K) // UNIT_K
    lengths = {
        (way, split): way.length(row_tiles, n, units, split, num_sms)
        for way in ways
        for split in range(1, min(MAX_SPLIT, units) + 1)
    }
    way, split = min(lengths, key=lambda choice: lengths[choice])
    widest = ways[0].config
    tiles = row_tiles * -(-n // widest.block_n)
    if one_width and tiles >= num_sms and tiles * units / num_sms + _EQUAL_SHARES < lengths[way, split]:
        return replace(widest, programs=num_sms)
    return replace(way.config, split_k=split)
