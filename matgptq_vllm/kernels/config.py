"""How a matrix product is cut into programs."""

from dataclasses import dataclass

MIN_BLOCK_M = 8
MIN_BLOCK_N = 64
MAX_SPLIT_ROWS = 256
"""Rows up to which K may be split."""


@dataclass(frozen=True)
class Config:
    """One way to run the fused product.

    Any configuration is right for any shape; they differ in speed only.
    """

    block_m: int
    """Rows of x per program: 8 or more, a power of two."""

    block_n: int
    """Outputs per program: 64 or 128."""

    split_k: int
    """Programs that share one tile, each with a part of K; their sums are added in order."""

    num_warps: int
    num_stages: int
    """Steps of K in flight."""

    step: int = 512
    """Columns per step: 512 or 256. Many rows need short steps, for x to fit in shared memory."""

    max_registers: int | None = None
    """Registers per thread, at most; None leaves it to the compiler. Fewer let more programs run at once."""

    pdl: bool = False
    """Whether the kernel may start before the one before it ends (programmatic dependent launch, compute capability 9.0)."""
