"""Who is timed: keys for the command line, labels for tables, and what a competitor brings to one matrix product."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SliceRule, num_groups
from matgptq_vllm.kernels.bench.shapes import GemmShape

SCALE_BYTES = 2
"""All competitors hold bfloat16 scales."""

REFERENCE_ROWS = 4096
"""Rows of W that a reference holds in float32 at a time."""

Family = Literal["bf16", "marlin", "machete", "width", "mixed", "alone"]


@dataclass(frozen=True)
class Competitor:
    """One row of the tables."""

    key: str
    label: str
    family: Family
    widths: tuple[int, ...]
    """Bits per weight that its rows meet; 16 for plain weights."""
    min_rows: int = 1
    """Smallest M at which it means anything."""

    @property
    def is_ours(self) -> bool:
        return self.family in ("width", "mixed", "alone")


BF16 = Competitor("bf16", "cuBLAS bf16", "bf16", (16,))
MARLIN = {bits: Competitor(f"marlin-w{bits}", f"Marlin W{bits}", "marlin", (bits,)) for bits in (4, 8)}
MACHETE = {bits: Competitor(f"machete-w{bits}", f"Machete W{bits}", "machete", (bits,)) for bits in (4, 8)}
PEERS = (BF16, MARLIN[4], MACHETE[4], MARLIN[8], MACHETE[8])
UNIFORM = {width: Competitor(f"width-{width}", f"width {width}", "width", (width,)) for width in sorted(WIDTHS, reverse=True)}
MIXED = Competitor("mixed-4-8", "half 4, half 8", "mixed", (4, 8), min_rows=2)
ALONE = {
    width: Competitor(f"alone-{width}", f"width {width} in a replica of one width", "alone", (width,)) for width in UNIFORM
}
ALL = (*PEERS, *UNIFORM.values(), MIXED, *ALONE.values())


@dataclass(frozen=True)
class Problem:
    """What every competitor is given for one layer of a model."""

    shape: GemmShape
    x: torch.Tensor
    """bfloat16 [largest M, k]; a smaller M takes the first rows."""
    group_size: int
    rule: SliceRule


@dataclass(frozen=True)
class Workload:
    """A competitor's copies of one layer."""

    calls: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    """One per weight copy: bfloat16 [M, k] -> bfloat16 [M, n]."""
    bytes_read: int
    """Weight bytes, scales included, that one call has to read."""
    reference: torch.Tensor
    """float32 [largest M, n]: the product of ``x`` with the dequantized weights of the first copy."""


def choose(peers: bool, widths: Sequence[int], alone: bool, only: Sequence[str]) -> tuple[Competitor, ...]:
    """The competitors of a run, in the order of the tables.

    Args:
        only: if not empty, just the competitors with these keys, whatever the other arguments say.
    """
    if only:
        unknown = [key for key in only if key not in {competitor.key for competitor in ALL}]
        if unknown:
            known = ", ".join(competitor.key for competitor in ALL)
            raise InputError(f"--only names {', '.join(map(repr, unknown))}, which is no competitor; use some of {known}")
        return tuple(competitor for competitor in ALL if competitor.key in only)
    return tuple(
        competitor
        for competitor in ALL
        if (competitor.is_ours and set(competitor.widths) <= set(widths) and (alone or competitor.family != "alone"))
        or (peers and not competitor.is_ours)
    )


def bytes_of_codes_and_scales(shape: GemmShape, bits: int, group_size: int) -> int:
    """Fewest bytes to read for all weights of ``shape`` at ``bits`` bits each, with their scales."""
    return shape.num_weights * bits // 8 + SCALE_BYTES * shape.n * num_groups(shape.k, group_size)


def random_scales(shape: GemmShape, group_size: int, width: int, device: torch.device) -> torch.Tensor:
    """bfloat16 [n, groups], positive, such that outputs are near 1 if levels span -2^(width - 1) .. 2^(width - 1)."""
    size = 2.0 ** (2 - width) * shape.k**-0.5
    scales = torch.rand(shape.n, num_groups(shape.k, group_size), device=device)
    return scales.add_(0.5).mul_(size).bfloat16()


def reference_product(x: torch.Tensor, n: int, weights: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """x @ W.T in float32, a strip of W at a time.

    Args:
        x: floating [M, K].
        weights: rows of W, floating [rows, K], by slice.

    Returns:
        float32 [M, n].
    """
    product = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    wide = x.float()
    for start in range(0, n, REFERENCE_ROWS):
        rows = slice(start, min(start + REFERENCE_ROWS, n))
        product[:, rows] = wide @ weights(rows).float().T
    return product


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """||y - reference|| / ||reference||, both [M, N]; NaN if y holds one."""
    return float((y.float() - reference).norm() / reference.norm())
