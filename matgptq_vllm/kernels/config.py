"""How a matrix product is cut into programs."""

from dataclasses import dataclass

MIN_BLOCK_M = 8
MAX_BLOCK_M = 32
MIN_BLOCK_N = 16
MAX_SPLIT_ROWS = 256
"""Rows up to which K may be split."""


@dataclass(frozen=True)
class Config:
    """One way to run the fused product.

    Any configuration is right for any shape; they differ in speed only.
    """

    block_m: int
    """Rows of x per program: 8, 16 or 32."""

    block_n: int
    """Outputs per program: 16, 32 or 64."""

    num_warps: int
    """Warps per program: each multiplies every num_warps-th unit of K."""

    depth: int
    """Units of K that a warp reads ahead."""

    split_k: int = 1
    """Programs that share one tile, each with a part of K; their sums are added in order."""

    max_registers: int | None = None
    """Registers per thread, at most; None leaves it to the compiler. Fewer let more programs run at once."""

    pdl: bool = False
    """Whether the kernel may start before the one before it ends (programmatic dependent launch, compute capability 9.0)."""
