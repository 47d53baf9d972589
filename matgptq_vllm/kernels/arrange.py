"""Rows of a mixed batch as ``kernels.wide`` reads them: those of one width side by side.

Rows go to places: those of the first width from place 0 on, in their order, those of the next one from the next row tile on. So
a row tile has rows of one width. A batch of one width is read where it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from matgptq_vllm.kernels.gemm import readable, widths_of
from matgptq_vllm.kernels.launch import Launcher, power_of_two
from matgptq_vllm.kernels.layout import UNIT_K, padded

_UNIT_K = tl.constexpr(UNIT_K)

ROWS_PER_PROGRAM = 16


class Arranged(NamedTuple):
    """Rows of x at their places; what no row has is undefined."""

    x: torch.Tensor
    """[places, K], or fewer if they are in the order that they had; rows begin at multiples of 16 bytes."""
    places: int
    """As many as row tiles have together."""
    row_places: torch.Tensor | None
    """int32 [places]: the row at a place, -1 for none; undefined in tiles without rows. None: row and place are the same."""


@triton.jit(do_not_specialize=["m"])
def _arrange_kernel(
    x_ptr, arranged, row_places, token_profiles, profile_widths, m, k, stride_x, stride,
    WIDTHS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (units of K, blocks of rows). Programs of unit 0 write the places of their rows, the first of them all else."""
    unit, block = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    others = tl.arange(0, ROWS)
    # No width is done: the argument that would name it is not read.
    widths, exists = widths_of(token_profiles, profile_widths, profile_widths, rows, rows < m, False)
    widths_of_all, _ = widths_of(token_profiles, profile_widths, profile_widths, others, others < m, False)
    before = (widths_of_all[None, :] == widths[:, None]) & (others[None, :] < rows[:, None])
    place = tl.sum(before.to(tl.int32), 1)
    if PDL:
        # Until here nothing is read that the kernel before this one may write, and nothing is written.
        gdc_wait()
        gdc_launch_dependents()
    tail = tl.arange(0, BLOCK_M)
    start = 0
    for index in tl.static_range(len(WIDTHS)):
        count = tl.sum((widths_of_all == WIDTHS[index]).to(tl.int32), 0)
        place = tl.where(widths == WIDTHS[index], start + place, place)
        end = start + (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        if (unit == 0) & (block == 0):
            tl.store(row_places + start + count + tail, -1, mask=start + count + tail < end)
        start = end
    if unit == 0:
        tl.store(row_places + place, rows, mask=exists)
    columns = unit * _UNIT_K + tl.arange(0, _UNIT_K)
    mask = exists[:, None] & (columns < k)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=mask)
    tl.store(arranged + place[:, None].to(tl.int64) * stride + columns[None, :], x, mask=mask)


_arranging = Launcher(_arrange_kernel)


def as_it_is(x: torch.Tensor, block_m: int) -> Arranged:
    """Rows that all have one width, in row tiles of ``block_m``; a copy if the copy engine could not read them."""
    return Arranged(readable(x), -(-x.shape[0] // block_m) * block_m, None)


def arrange(
    x: torch.Tensor,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    block_m: int,
    pdl: bool,
) -> Arranged:
    """Bring rows of x to their places.

    Args:
        x: floating [M, K], rows may be strided.
        token_profiles: int32 [at least M].
        profile_widths: int32 [profiles].
        widths: every width that ``profile_widths`` may hold, ascending.
        block_m: rows of a tile.
        pdl: whether the kernel may start before the one before it ends.
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    places = (-(-m // block_m) + len(widths) - 1) * block_m
    result = Arranged(x.new_empty(places, padded(k, 8)), places, x.new_empty(places, dtype=torch.int32))
    stride_x, stride = x.stride(0), result.x.stride(0)
    _arranging.launch(
        (x.dtype, x.device, k, stride_x, stride),
        (padded(k, UNIT_K) // UNIT_K, -(-m // ROWS_PER_PROGRAM), 1),
        (x, result.x, result.row_places, token_profiles, profile_widths, m, k, stride_x, stride),
        {
            "WIDTHS": tuple(widths), "ROWS": max(power_of_two(m), ROWS_PER_PROGRAM), "BLOCK": ROWS_PER_PROGRAM,
            "BLOCK_M": block_m, "PDL": pdl,
        },
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return result._replace(x=result.x[:, :k])
