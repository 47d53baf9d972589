"""The product for many rows: the layer is expanded at a width, a strip of outputs at a time, and cuBLAS multiplies.

Expanding costs the same for any M, and cuBLAS is at the hardware's limit, so that from some hundred rows on this is faster
than the fused product (kernels.gemm); ``kernels.tuning.dense_from`` says from how many.

A row's result depends on how many rows share its width in the call, because cuBLAS picks its algorithm by the shape.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.gemm import lane_code
from matgptq_vllm.kernels.lanes import bits_needed, factor, load_words, weights
from matgptq_vllm.kernels.lanes_ptx import LaneCode
from matgptq_vllm.kernels.layout import BLOCK_K, PAD_N, PLANE_WIDTHS

STRIP_BYTES = 256 << 20
"""Most bytes of expanded weights at a time. It bounds memory. A strip of some 28 MiB would stay in a Hopper's L2 cache, but
products with few outputs leave programs of cuBLAS without work: 1024 outputs for 2048 rows are half a wave of an H200."""

BLOCK_N = 32
"""Rows of W per program: 64 bytes of a plane each, 16 bytes per thread of four warps."""

NUM_WARPS = 4

_BLOCK_K = tl.constexpr(BLOCK_K)


@dataclass(frozen=True)
class WidthOnDevice:
    """A width that the host does not know, as in a CUDA graph."""

    value: torch.Tensor
    """int32, one element."""

    widths: tuple[int, ...]
    """What it may be."""


Width: TypeAlias = int | WidthOnDevice


@triton.jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    plane0, plane1, plane2, plane3, plane4, scales, out_ptr, width_ptr, first_row, num_rows, n_padded, k,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, blocks of K). Rows first_row .. first_row + num_rows - 1 of W, into out [num_rows, k]. The width is
    that of WIDTHS, or if they are several the one at ``width_ptr``."""
    if len(WIDTHS) == 1:
        _expand(
            plane0, plane1, plane2, plane3, plane4, scales, out_ptr, first_row, num_rows, n_padded, k,
            WIDTHS[0], RULE, GROUP, EVEN_K, BLOCK_N, CODE,
        )  # fmt: skip
    else:
        width = tl.load(width_ptr)
        for index in tl.static_range(len(WIDTHS)):
            if width == WIDTHS[index]:
                _expand(
                    plane0, plane1, plane2, plane3, plane4, scales, out_ptr, first_row, num_rows, n_padded, k,
                    WIDTHS[index], RULE, GROUP, EVEN_K, BLOCK_N, CODE,
                )  # fmt: skip


@triton.jit
def _expand(
    plane0, plane1, plane2, plane3, plane4, scales, out_ptr, first_row, num_rows, n_padded, k,
    WIDTH: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = bits_needed(WIDTH, RULE)
    # Weights of half precision are nearer to the levels than those of bfloat16, whatever the result's type.
    DTYPE: tl.constexpr = tl.float32 if CODE is None else tl.float16
    TILES: tl.constexpr = 16 if GROUP == -1 else GROUP // 32
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    tile_k = tl.arange(0, 32)
    source = first_row + rows
    offsets = source[:, None] * 32 + tile_k[None, :]
    row_mask = rows < num_rows
    out = out_ptr + rows[:, None].to(tl.int64) * k
    scale = tl.load(scales + source).to(tl.float32)
    for half in tl.static_range(2):
        pair = (block * 2 + half) * n_padded * 32 + offsets
        single = block * n_padded * 32 + offsets
        words = (load_words(plane0, pair, CODE),)
        if BITS >= 3:
            words = words + (load_words(plane1, single, CODE),)
        if BITS >= 4:
            words = words + (load_words(plane2, single, CODE),)
        if BITS >= 6:
            words = words + (load_words(plane3, pair, CODE),)
        if BITS >= 8:
            words = words + (load_words(plane4, pair, CODE),)
        tiles = weights(words, WIDTH, half, RULE, DTYPE, CODE)
        for field in tl.static_range(8):
            if GROUP != -1 and field % TILES == 0:
                group = block * (16 // TILES) + (half * 8 + field) // TILES
                scale = tl.load(scales + group * n_padded + source).to(tl.float32)
            weight = tiles[field].to(tl.float32) * (scale * factor(WIDTH, RULE, CODE))[:, None]
            columns = block * _BLOCK_K + (half * 8 + field) * 32 + tile_k
            mask = row_mask[:, None] if EVEN_K else row_mask[:, None] & (columns < k)[None, :]
            tl.store(out + columns[None, :], weight.to(out_ptr.dtype.element_ty), mask=mask)


def dense_linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    k: int,
    rows_of_width: Sequence[tuple[Width, torch.Tensor | None]],
    group_size: int,
    rule: SliceRule,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias, where the rows named with a width meet the weights read at it.

    Args:
        x: bfloat16 or float16 [M, K] on a GPU (any floating type in Triton's interpreter); rows may be strided.
        planes: leading kernel planes (kernels.layout), enough for the widest width.
        scales: floating, kernel layout.
        n: outputs.
        k: inputs.
        rows_of_width: width, and the rows that have it: int32 or int64 on the device of ``x``, or None for all. Together
            they must name every row once; rows of the result that none names hold anything.
        bias: [N], any floating type.

    Returns:
        [M, N], dtype of x.
    """
    y = x.new_empty(x.shape[0], n)
    if bias is not None:
        bias = bias.to(x.dtype)
    for width, rows in rows_of_width:
        if rows is None:
            _product(x, planes, scales, k, width, group_size, rule, bias, y)
        elif len(rows):
            part = y.new_empty(len(rows), n)
            _product(x.index_select(0, rows), planes, scales, k, width, group_size, rule, bias, part)
            y.index_copy_(0, rows.long(), part)
    return y


def expand(
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    width: Width,
    group_size: int,
    rule: SliceRule,
    first_row: int,
    out: torch.Tensor,
) -> None:
    """Write weights of a layer, read at ``width``, into ``out``: scale * level in float32, rounded once.

    Args:
        planes: leading kernel planes (kernels.layout), enough for the widest that ``width`` may be.
        scales: floating, kernel layout.
        first_row: first row of W to expand, a multiple of 128.
        out: contiguous [rows, K], floating: as many rows as fit.
    """
    num_rows, k = out.shape
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    value, widths = (scales, (width,)) if isinstance(width, int) else (width.value, width.widths)
    _expand_kernel[(triton.cdiv(num_rows, BLOCK_N), planes[0].shape[0])](
        *given, scales, out, value, first_row, num_rows, scales.shape[1], k, WIDTHS=widths, RULE=rule, GROUP=group_size,
        EVEN_K=k % BLOCK_K == 0, BLOCK_N=BLOCK_N, CODE=None if lane_code(out) is None else LaneCode("f16"), num_warps=NUM_WARPS,
    )  # fmt: skip


def rows_per_strip(n: int, bytes_per_row: int) -> int:
    """Rows of W [n, k] to expand at a time: a multiple of 128, such that strips are equal and few."""
    most = max(STRIP_BYTES // bytes_per_row // PAD_N, 1)
    tiles = -(-n // PAD_N)
    return -(-tiles // -(-tiles // most)) * PAD_N


def _product(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    k: int,
    width: Width,
    group_size: int,
    rule: SliceRule,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> None:
    """y = x @ W.T + bias for all rows of ``x``, W at one width."""
    n = y.shape[1]
    strip = rows_per_strip(n, k * x.element_size())
    workspace = x.new_empty(min(strip, n), k)
    for start in range(0, n, strip):
        end = min(start + strip, n)
        weight = workspace[: end - start]
        expand(planes, scales, width, group_size, rule, start, weight)
        # A view of columns: cuBLAS writes there, with the stride of the whole.
        out = y[:, start:end]
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias[start:end], x, weight.T, out=out)
