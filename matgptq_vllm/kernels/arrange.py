"""x as ``kernels.wide`` reads it: rows of one width side by side, columns in the order of the tensor cores' operand.

Rows go to places: those of the first width from place 0 on, in their order, those of the next one from the next row tile on. So
a row tile has rows of one width. Of every 32 columns, column 8j + 4i + 2u + l goes to 16i + 8u + 2j + l (kernels.layout says
why).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from matgptq_vllm.kernels.gemm import widths_of
from matgptq_vllm.kernels.launch import Launcher, power_of_two
from matgptq_vllm.kernels.layout import UNIT_K, padded

_UNIT_K = tl.constexpr(UNIT_K)

ROWS_PER_PROGRAM = 16


class Arranged(NamedTuple):
    """Rows of x at their places; what no row has is undefined, but for ``tile_widths``."""

    x: torch.Tensor
    """[units of K, places, 128], dtype of x."""
    tile_widths: torch.Tensor
    """int32 [row tiles]: the width of a tile's rows, 0 if it has none."""
    row_places: torch.Tensor
    """int32 [places]: the row at a place, -1 for none; undefined in tiles without rows."""


@triton.jit(do_not_specialize=["m"])
def _arrange_kernel(
    x_ptr, arranged, tile_widths, row_places, token_profiles, profile_widths, done_width, m, k, stride_x, places,
    WIDTHS: tl.constexpr, SOME_DONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    MAX_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (units of K, blocks of rows). Programs of unit 0 write the places of their rows, the first of them all else."""
    unit, block = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    others = tl.arange(0, ROWS)
    widths = _widths_of(token_profiles, profile_widths, done_width, rows, m, WIDTHS, SOME_DONE)
    widths_of_all = _widths_of(token_profiles, profile_widths, done_width, others, m, WIDTHS, SOME_DONE)
    before = (widths_of_all[None, :] == widths[:, None]) & (others[None, :] < rows[:, None])
    place = tl.sum(before.to(tl.int32), 1)
    if PDL:
        # Until here nothing is read that the kernel before this one may write, and nothing is written.
        gdc_wait()
        gdc_launch_dependents()
    first = (unit == 0) & (block == 0)
    tiles = tl.arange(0, MAX_TILES)
    widths_of_tiles = tl.zeros((MAX_TILES,), tl.int32)
    tail = tl.arange(0, BLOCK_M)
    start = 0
    for index in tl.static_range(len(WIDTHS)):
        count = tl.sum((widths_of_all == WIDTHS[index]).to(tl.int32), 0)
        place = tl.where(widths == WIDTHS[index], start + place, place)
        end = start + (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        widths_of_tiles = tl.where((tiles >= start // BLOCK_M) & (tiles < end // BLOCK_M), WIDTHS[index], widths_of_tiles)
        if first:
            tl.store(row_places + start + count + tail, -1, mask=start + count + tail < end)
        start = end
    if first:
        tl.store(tile_widths + tiles, widths_of_tiles, mask=tiles < places // BLOCK_M)
    placed = widths != 0
    if unit == 0:
        tl.store(row_places + place, rows, mask=placed)
    columns = unit * _UNIT_K + tl.arange(0, _UNIT_K)
    mask = placed[:, None]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=mask & (columns < k)[None, :], other=0.0)
    # row, piece, j, i, u, l -> row, piece, i, u, j, l
    x = tl.reshape(tl.permute(tl.reshape(x, (BLOCK, _UNIT_K // 32, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5)), (BLOCK, _UNIT_K))
    to = (unit * places + place[:, None]).to(tl.int64) * _UNIT_K + tl.arange(0, _UNIT_K)[None, :]
    tl.store(arranged + to, x, mask=mask)


@triton.jit
def _widths_of(token_profiles, profile_widths, done_width, rows, m, WIDTHS: tl.constexpr, SOME_DONE: tl.constexpr):
    """Widths of rows, 0 for those that get no place."""
    exists = rows < m
    if len(WIDTHS) == 1:
        widths = tl.where(exists, WIDTHS[0], 0)
    else:
        widths, _ = widths_of(token_profiles, profile_widths, done_width, rows, exists, SOME_DONE)
    return widths


_arranging = Launcher(_arrange_kernel)


def arrange(
    x: torch.Tensor,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    block_m: int,
    pdl: bool,
    done_width: torch.Tensor | None = None,
) -> Arranged:
    """Bring rows of x to their places.

    Args:
        x: floating [M, K], rows may be strided.
        token_profiles: int32 [at least M].
        profile_widths: int32 [profiles].
        widths: every width that ``profile_widths`` may hold, ascending. With one, nothing is looked up.
        block_m: rows of a tile.
        pdl: whether the kernel may start before the one before it ends.
        done_width: int32, one element on the device: rows of this width get no place.
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles = -(-m // block_m) + len(widths) - 1
    units_k, places = padded(k, UNIT_K) // UNIT_K, tiles * block_m
    numbers = x.new_empty(tiles + places, dtype=torch.int32)
    result = Arranged(x.new_empty(units_k, places, UNIT_K), numbers[places:], numbers[:places])
    stride = x.stride(0)
    _arranging.launch(
        (x.dtype, x.device, k, stride, places),
        (units_k, -(-m // ROWS_PER_PROGRAM), 1),
        (
            x, result.x, result.tile_widths, result.row_places, token_profiles, profile_widths,
            token_profiles if done_width is None else done_width, m, k, stride, places,
        ),
        {
            "WIDTHS": tuple(widths), "SOME_DONE": done_width is not None,
            "ROWS": max(power_of_two(m), ROWS_PER_PROGRAM), "BLOCK": ROWS_PER_PROGRAM, "BLOCK_M": block_m,
            "MAX_TILES": power_of_two(tiles), "PDL": pdl,
        },
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return result
