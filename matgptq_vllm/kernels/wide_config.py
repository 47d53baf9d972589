"""When and how the wide product (kernels.wide) runs."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from matgptq_vllm.kernels.layout import PAD_N, UNIT_N, padded

WIDE_FROM = 33
"""Rows from which it is faster than kernels.gemm, whose programs handle up to 32."""

CAPABILITY_MAJOR = 9
"""Hopper: the only GPUs with its tensor core instructions (wgmma)."""

_PROGRAMS = {32: 4.0, 64: 2.0, 128: 1.0}
"""Rows of a tile -> programs per multiprocessor that hide each other's waits; by measurement (docs/kernels.md)."""

MAX_SPLIT = 8


@dataclass(frozen=True)
class WideConfig:
    """One way to run the wide product. Any is right for any shape; they differ in speed only."""

    block_m: int
    """Rows per program: 32, 64 or 128."""

    split_k: int
    """Programs that share one tile, each with a part of K; their sums are added in order."""

    num_warps: int = 4
    """Warps per program, each with 16 outputs: 4 or, where 128 divides the padded outputs, 8."""

    stages: int = 3
    """Units of K in shared memory."""

    pdl: bool = True
    """Whether the kernel may start before the one before it ends."""


@lru_cache(maxsize=16)
def wide_runs(device: torch.device) -> bool:
    """Whether ``device`` and the installed Triton can run the wide product."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return (
        torch.cuda.get_device_capability(device)[0] == CAPABILITY_MAJOR and find_spec("triton.experimental.gluon") is not None
    )


@lru_cache(maxsize=4096)
def wide_config(bucket: int, n: int, num_sms: int) -> WideConfig:
    """The configuration for a range of M (kernels.tables.bucket) and a layer with ``n`` outputs.

    K is split into a power of two of shares, so that about as many programs run as hide each other's waits.
    """
    block_m = min(max(bucket, min(_PROGRAMS)), max(_PROGRAMS))
    row_tiles, padded_n = -(-bucket // block_m), padded(n, PAD_N)
    # Wider programs read x less often, where enough of them are left.
    num_warps = 8 if block_m == max(_PROGRAMS) and padded_n % 128 == 0 and row_tiles * padded_n // 128 >= num_sms else 4
    tiles = row_tiles * padded_n // (UNIT_N * num_warps)
    wanted = _PROGRAMS[block_m] * num_sms / tiles
    split = 1
    while split < MAX_SPLIT and split * 2 <= wanted * 1.25:
        split *= 2
    return WideConfig(block_m, split, num_warps)
