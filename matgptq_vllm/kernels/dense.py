"""The product for many rows: the layer is expanded at a width, a strip of outputs at a time, and cuBLAS multiplies.

Expanding costs the same for any M, and cuBLAS is at the hardware's limit, so that from some hundred rows on this is faster
than the fused product (kernels.gemm); ``kernels.tuning.dense_from`` says from how many.

A row's result depends on how many rows share its width in the call, because cuBLAS picks its algorithm by the shape.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import triton
import triton.language as tl

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels import expand_ptx
from matgptq_vllm.kernels.gemm import lane_code
from matgptq_vllm.kernels.lanes import (
    bits_needed,
    both_scales,
    factor,
    load_scales,
    load_unit,
    num_terms,
    piece_weights,
    plain_scales,
    plain_weights,
)
from matgptq_vllm.kernels.lanes_ptx import LaneCode
from matgptq_vllm.kernels.launch import Launcher
from matgptq_vllm.kernels.layout import PIECE_K, PLANE_WIDTHS, UNIT_K, UNIT_N

STRIP_BYTES = 256 << 20
"""Most bytes of expanded weights at a time. It bounds memory. A strip of some 28 MiB would stay in a Hopper's L2 cache, but
products with few outputs leave programs of cuBLAS without work: 1024 outputs for 2048 rows are half a wave of an H200."""

STRIP_ROWS = 128
"""Strips have a multiple of so many rows, which cuBLAS's tiles divide."""

NUM_WARPS = 4
"""Warps per program, each with a unit (kernels.layout) of its own."""

_UNIT_N = tl.constexpr(UNIT_N)
_UNIT_K = tl.constexpr(UNIT_K)
_PIECE_K = tl.constexpr(PIECE_K)
_ADJACENT = tl.constexpr(expand_ptx.ADJACENT)

_scaled = triton.constexpr_function(expand_ptx.scaled)
_exchanged = triton.constexpr_function(expand_ptx.exchanged)
_store = triton.constexpr_function(expand_ptx.store)


@dataclass(frozen=True)
class WidthOnDevice:
    """A width that the host does not know, as in a CUDA graph."""

    value: torch.Tensor
    """int32, one element."""

    widths: tuple[int, ...]
    """What it may be."""


Width: TypeAlias = int | WidthOnDevice


@triton.jit(do_not_specialize=["first_row", "num_rows", "k", "units_k"])
def _expand_kernel(
    plane0, plane1, plane2, plane3, plane4, scales, out_ptr, width_ptr, first_row, num_rows, k, units_k,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, WARPS: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Grid: (WARPS units each). Rows first_row .. first_row + num_rows - 1 of W, into out [num_rows, k]. The width is that of
    WIDTHS, or if they are several the one at ``width_ptr``."""
    planes = (plane0, plane1, plane2, plane3, plane4)
    if len(WIDTHS) == 1:
        _expand(
            planes, scales, out_ptr, first_row, num_rows, k, units_k,
            WIDTHS[0], RULE, GROUP, EVEN_K, WARPS, CODE,
        )  # fmt: skip
    else:
        width = tl.load(width_ptr)
        for index in tl.static_range(len(WIDTHS)):
            if width == WIDTHS[index]:
                _expand(
                    planes, scales, out_ptr, first_row, num_rows, k, units_k,
                    WIDTHS[index], RULE, GROUP, EVEN_K, WARPS, CODE,
                )  # fmt: skip


@triton.jit
def _expand(
    planes, scales, out_ptr, first_row, num_rows, k, units_k,
    WIDTH: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, WARPS: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    if CODE is None:
        _expand_plain(
            planes, scales, out_ptr, first_row, num_rows, k, units_k,
            WIDTH, RULE, GROUP, WARPS,
        )  # fmt: skip
    else:
        _expand_units(
            planes, scales, out_ptr, first_row, num_rows, k, units_k,
            WIDTH, RULE, GROUP, EVEN_K, WARPS, CODE,
        )  # fmt: skip


@triton.jit
def _expand_units(
    planes, scales, out_ptr, first_row, num_rows, k, units_k,
    WIDTH: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, WARPS: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """A unit per warp, in the order in which planes hold them. Needs rows of whole 16 bytes."""
    # Of every piece, a lane stores 8 adjacent columns of rows g and g + 8.
    TERMS: tl.constexpr = num_terms(WIDTH, RULE)
    GROUPS: tl.constexpr = 1 if GROUP == -1 else _UNIT_K // GROUP
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    unit = tl.program_id(0) * WARPS + thread // 32
    tile = unit // units_k
    row = tile * _UNIT_N + lane // 4
    column = unit % units_k * _UNIT_K + lane % 4 * _ADJACENT
    mask = tile * _UNIT_N < num_rows
    first_tile = first_row // _UNIT_N
    source = first_tile * units_k + unit
    words = load_unit(planes, source, lane, mask, mask, mask, mask, mask, bits_needed(WIDTH, RULE), CODE)
    # All scales come before the first store, across which the compiler would move no load.
    pairs_of_scales = ()
    for group in tl.static_range(GROUPS):
        place = first_tile + tile if GROUP == -1 else source * GROUPS + group
        pairs_of_scales = pairs_of_scales + (load_scales(scales, place * 8 + lane // 4, mask),)
    start = out_ptr + row.to(tl.int64) * k + column
    for piece in tl.static_range(_UNIT_K // _PIECE_K):
        pairs = piece_weights(words, piece, WIDTH, RULE, CODE)
        scale = both_scales(pairs_of_scales[piece * GROUPS // (_UNIT_K // _PIECE_K)])
        for lower in tl.static_range(2):
            wanted = row + 8 * lower < num_rows
            if not EVEN_K:
                wanted = wanted & (column + piece * _PIECE_K < k)
            place = start + 8 * lower * k + piece * _PIECE_K
            _store_row(place, pairs, scale[lower] * factor(RULE), wanted, lane, lower, TERMS)


@triton.jit
def _store_row(place, pairs, scale, wanted, lane, LOWER: tl.constexpr, TERMS: tl.constexpr):
    """Store a lane's 8 columns of row g, or with LOWER of row g + 8, of a piece; ``pairs`` are those of ``piece_weights``."""
    # Weights are in half precision, which is nearer to the levels than bfloat16, whatever the result's type.
    given = (pairs[LOWER], pairs[2 + LOWER], pairs[4 + LOWER], pairs[6 + LOWER])
    if TERMS == 2:
        given = given + (pairs[8 + LOWER], pairs[10 + LOWER], pairs[12 + LOWER], pairs[14 + LOWER])
    scaled: tl.constexpr = _scaled("bf16" if place.dtype.element_ty == tl.bfloat16 else "f16", TERMS)
    words = tl.inline_asm_elementwise(scaled[0], scaled[1], given + (scale,), (tl.int32,) * 4, True, 1)
    exchanged: tl.constexpr = _exchanged()
    words = tl.inline_asm_elementwise(exchanged[0], exchanged[1], words + (lane,), (tl.int32,) * 4, False, 1)
    store: tl.constexpr = _store()
    tl.inline_asm_elementwise(store[0], store[1], (place.to(tl.int64), wanted.to(tl.int32)) + words, tl.int32, False, 1)


@triton.jit
def _expand_plain(
    planes, scales, out_ptr, first_row, num_rows, k, units_k,
    WIDTH: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """As ``_expand_units``, in plain Triton, for its interpreter and for rows of any length."""
    SIZE: tl.constexpr = _UNIT_K if GROUP == -1 else GROUP
    groups = 1 if GROUP == -1 else units_k * (_UNIT_K // SIZE)
    for unit in tl.range(tl.program_id(0) * WARPS, tl.program_id(0) * WARPS + WARPS):
        rows = unit // units_k * _UNIT_N + tl.arange(0, _UNIT_N)[:, None]
        columns = unit % units_k * _UNIT_K + tl.arange(0, _UNIT_K)[None, :]
        # The last program may have units beyond the last row, which the planes may not have.
        outputs = first_row + tl.where(rows < num_rows, rows, 0)
        level = plain_weights(planes, outputs, columns, units_k, WIDTH, RULE)
        scale = plain_scales(scales, outputs, 0 if GROUP == -1 else columns // SIZE, groups)
        weight = (level * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows.to(tl.int64) * k + columns, weight, mask=(rows < num_rows) & (columns < k))


_expanding = Launcher(_expand_kernel)


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
    if bias is not None:
        bias = bias.to(x.dtype)
    for width, rows in rows_of_width:
        if rows is None:
            return _product(x, planes, scales, n, k, width, group_size, rule, bias)
    y = x.new_empty(x.shape[0], n)
    for width, rows in rows_of_width:
        if rows is not None and len(rows):
            part = _product(x.index_select(0, rows), planes, scales, n, k, width, group_size, rule, bias)
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
        first_row: first row of W to expand, a multiple of 16.
        out: contiguous [rows, K], bfloat16 or float16 on a GPU (any floating type in Triton's interpreter): as many rows as
            fit.
    """
    num_rows, k = out.shape
    units_k = planes[0].shape[1]
    given = (*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes)))
    value, widths = (scales, (width,)) if isinstance(width, int) else (width.value, width.widths)
    whole = k % expand_ptx.ADJACENT == 0 and out.data_ptr() % 16 == 0
    even_k = k % UNIT_K == 0
    units = -(-num_rows // UNIT_N) * units_k
    _expanding.launch(
        (out.dtype, scales.dtype, out.device),
        (-(-units // NUM_WARPS), 1, 1),
        (*given, scales, out, value, first_row, num_rows, k, units_k),
        {
            "WIDTHS": widths, "RULE": rule, "GROUP": group_size, "EVEN_K": even_k, "WARPS": NUM_WARPS,
            "CODE": LaneCode.of(torch.float16) if whole and lane_code(out) is not None else None,
        },
        num_warps=NUM_WARPS,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def rows_per_strip(n: int, bytes_per_row: int) -> int:
    """Rows of W [n, k] to expand at a time: a multiple of STRIP_ROWS, such that strips are equal and few."""
    most = max(STRIP_BYTES // bytes_per_row // STRIP_ROWS, 1)
    tiles = -(-n // STRIP_ROWS)
    return -(-tiles // -(-tiles // most)) * STRIP_ROWS


def _product(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    k: int,
    width: Width,
    group_size: int,
    rule: SliceRule,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for all rows of ``x``, W at one width."""
    strip = rows_per_strip(n, k * x.element_size())
    workspace = x.new_empty(min(strip, n), k)
    if strip >= n:
        # The host's time counts where rows are some hundred: as few calls as can be.
        expand(planes, scales, width, group_size, rule, 0, workspace)
        return torch.nn.functional.linear(x, workspace, bias)
    y = x.new_empty(x.shape[0], n)
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
    return y
