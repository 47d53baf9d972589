"""``column_sweep.sweep_columns`` as one Triton kernel: a program takes some rows of the layer through all columns of a run.

Rows are independent, so nothing is shared between programs. A program is one warp and a row is one of its lanes; what the
columns before have passed on stays in registers. The twin in ``column_sweep`` states layouts and arithmetic.
"""

import torch
import triton
import triton.language as tl

from calibrate.objective import BIN_BITS, LevelTables, bin_shift, codes_per_prefix
from matgptq_vllm.core.slicing import BEND, ZERO_LEVEL, SliceRule

MAX_RUN = 32
"""Columns per launch: five times as many registers per lane hold what they pass on."""

BLOCK_N = 32
"""Rows per program: one per lane."""

_ZERO = tl.constexpr(float(ZERO_LEVEL))
_BEND = tl.constexpr(BEND)
_BIN = tl.constexpr(1 << BIN_BITS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _nearest(y, CURVED: tl.constexpr, ROUND: tl.constexpr):
    """Code nearest to each value: core.slicing.nearest_codes, int32."""
    if CURVED:
        size = (tl.sqrt_rn(tl.abs(y) * (4.0 * _BEND) + 1.0) - 1.0) / (2.0 * _BEND)
        y = tl.where(y < 0, -size, size)
    y = y + _ZERO
    if ROUND:
        # Half to even, as torch rounds.
        below = tl.floor(y)
        rest = y - below
        odd = below - 2.0 * tl.floor(below * 0.5)
        y = tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), below + 1.0, below)
    y = tl.minimum(tl.maximum(y, 0.0), 2.0 * _ZERO - 1.0)
    return y.to(tl.int32)


@triton.jit
def _within_bin(codes, y, SHIFT: tl.constexpr, CURVED: tl.constexpr):
    """The nearest of ``codes`` in the bin of 6 bits of each target: objective._within_bin, int32."""
    below = tl.minimum(_nearest(y, CURVED, False), 255 - SHIFT)
    first = (below + SHIFT) // _BIN * _BIN - SHIFT
    within = tl.minimum(tl.maximum(codes, first), first + (_BIN - 1))
    return tl.minimum(tl.maximum(within, 0), 255)


@triton.jit
def _level(code, DROP: tl.constexpr, CURVED: tl.constexpr, ROUND: tl.constexpr):
    """Level of each code with its DROP lowest bits unread: core.slicing.levels, float32."""
    if DROP == 0:
        part = code
    else:
        part = code >> DROP
        if ROUND:
            part = tl.minimum(part + ((code >> (DROP - 1)) & 1), (256 >> DROP) - 1)
    straight = part.to(tl.float32) * (1 << DROP) - _ZERO
    if not ROUND:
        straight += (1 << DROP) / 2
    if CURVED:
        straight = straight * (tl.abs(straight) * _BEND + 1.0)
    return straight


@triton.jit
def _loss(code, u0, u1, u2, u3, u4, i0, i1, i2, i3, i4, CURVED: tl.constexpr, ROUND: tl.constexpr):
    """The joint objective of each code, summed in the order of the twin."""
    e0 = u0 - _level(code, 6, CURVED, ROUND)
    e1 = u1 - _level(code, 5, CURVED, ROUND)
    e2 = u2 - _level(code, 4, CURVED, ROUND)
    e3 = u3 - _level(code, 2, CURVED, ROUND)
    e4 = u4 - _level(code, 0, CURVED, ROUND)
    return i0 * (e0 * e0) + i1 * (e1 * e1) + i2 * (e2 * e2) + i3 * (e3 * e3) + i4 * (e4 * e4)


@triton.jit
def _target(base, values, squares, passed, j, run, at, mask, index, DESCENT: tl.constexpr):
    """Target of column j at one width; also M's pivot and the value before. ``passed`` [MAX_RUN, BLOCK_N] is 0 from j on."""
    m = tl.load(squares + index * run + j, mask=index < run, other=0.0)
    pivot = tl.load(squares + j * run + j)
    target = tl.load(base + at, mask=mask, other=0.0) - tl.sum(m[:, None] * passed, axis=0)
    before = target
    if DESCENT:
        before = tl.load(values + at, mask=mask, other=0.0)
        target = before + target / pivot
    return target, pivot, before


@triton.jit
def _settle(target, pivot, before, level, scale, values, out, passed, at, j, mask, index, DESCENT: tl.constexpr):
    """Store a column's value at one width and what it passes on; the latter also into row j of ``passed``."""
    value = level * scale
    if DESCENT:  # noqa: SIM108 (an if statement on a constant is compiled away)
        told = value - before
    else:
        told = (target - value) / pivot
    tl.store(values + at, value, mask=mask)
    tl.store(out + at, told, mask=mask)
    return tl.where((index == j)[:, None], told[None, :], passed)


@triton.jit
def _sweep_kernel(
    base,  # float32 [5, run, N], strides (width_stride, N, 1)
    values,  # float32 [5, run, N], same strides
    squares,  # float32 [5, run, run]
    scales,  # float32 [run, N]
    weights,  # float32 [5]
    codes,  # uint8 [run, N]
    out,  # float32 [5, run, N], contiguous
    run,
    n,
    base_stride,
    values_stride,
    NUM_PREFIXES: tl.constexpr,
    SPAN: tl.constexpr,
    SHIFT: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    DESCENT: tl.constexpr,
    CURVED: tl.constexpr,
    ROUND: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < n
    index = tl.arange(0, RUN)
    square = run * run
    p0 = tl.zeros((RUN, ROWS), tl.float32)
    p1 = tl.zeros((RUN, ROWS), tl.float32)
    p2 = tl.zeros((RUN, ROWS), tl.float32)
    p3 = tl.zeros((RUN, ROWS), tl.float32)
    p4 = tl.zeros((RUN, ROWS), tl.float32)
    for j in range(run):
        at = j * n + rows
        scale = tl.load(scales + at, mask=mask, other=0.0)
        divisor = tl.where(scale > 0, scale, 1.0)
        t0, d0, v0 = _target(base, values, squares, p0, j, run, at, mask, index, DESCENT)
        t1, d1, v1 = _target(base + base_stride, values + values_stride, squares + square, p1, j, run, at, mask, index, DESCENT)
        t2, d2, v2 = _target(
            base + 2 * base_stride, values + 2 * values_stride, squares + 2 * square, p2, j, run, at, mask, index, DESCENT
        )
        t3, d3, v3 = _target(
            base + 3 * base_stride, values + 3 * values_stride, squares + 3 * square, p3, j, run, at, mask, index, DESCENT
        )
        t4, d4, v4 = _target(
            base + 4 * base_stride, values + 4 * values_stride, squares + 4 * square, p4, j, run, at, mask, index, DESCENT
        )
        if DESCENT:
            i0, i1, i2, i3, i4 = d0, d1, d2, d3, d4
        else:
            i0, i1, i2, i3, i4 = 1 / (d0 * d0), 1 / (d1 * d1), 1 / (d2 * d2), 1 / (d3 * d3), 1 / (d4 * d4)
        area = divisor * divisor
        i0 = tl.load(weights) * i0 * area
        i1 = tl.load(weights + 1) * i1 * area
        i2 = tl.load(weights + 2) * i2 * area
        i3 = tl.load(weights + 3) * i3 * area
        i4 = tl.load(weights + 4) * i4 * area
        u0, u1, u2, u3, u4 = t0 / divisor, t1 / divisor, t2 / divisor, t3 / divisor, t4 / divisor

        nearest = _nearest(u4, CURVED, ROUND)
        least = tl.full((ROWS,), float("inf"), tl.float32)
        code = tl.zeros((ROWS,), tl.int32)
        for prefix in range(NUM_PREFIXES):
            low = tl.zeros((ROWS,), tl.int32) + prefix * SPAN
            candidate = tl.minimum(tl.maximum(nearest, low), low + (SPAN - 1))
            loss = _loss(candidate, u0, u1, u2, u3, u4, i0, i1, i2, i3, i4, CURVED, ROUND)
            better = loss < least
            least = tl.where(better, loss, least)
            code = tl.where(better, candidate, code)
        six = _within_bin(nearest, u3, SHIFT, CURVED)
        loss = _loss(six, u0, u1, u2, u3, u4, i0, i1, i2, i3, i4, CURVED, ROUND)
        code = tl.where(loss < least, six, code)
        least = tl.minimum(loss, least)
        both = _within_bin(nearest, (i3 * u3 + i4 * u4) / tl.maximum(i3 + i4, _TINY), SHIFT, CURVED)
        loss = _loss(both, u0, u1, u2, u3, u4, i0, i1, i2, i3, i4, CURVED, ROUND)
        code = tl.where(loss < least, both, code)
        tl.store(codes + at, code.to(tl.uint8), mask=mask)

        step = run * n
        p0 = _settle(t0, d0, v0, _level(code, 6, CURVED, ROUND), scale, values, out, p0, at, j, mask, index, DESCENT)
        p1 = _settle(
            t1, d1, v1, _level(code, 5, CURVED, ROUND), scale,
            values + values_stride, out + step, p1, at, j, mask, index, DESCENT,
        )  # fmt: skip
        p2 = _settle(
            t2, d2, v2, _level(code, 4, CURVED, ROUND), scale,
            values + 2 * values_stride, out + 2 * step, p2, at, j, mask, index, DESCENT,
        )  # fmt: skip
        p3 = _settle(
            t3, d3, v3, _level(code, 2, CURVED, ROUND), scale,
            values + 3 * values_stride, out + 3 * step, p3, at, j, mask, index, DESCENT,
        )  # fmt: skip
        p4 = _settle(
            t4, d4, v4, _level(code, 0, CURVED, ROUND), scale,
            values + 4 * values_stride, out + 4 * step, p4, at, j, mask, index, DESCENT,
        )  # fmt: skip


def sweep_columns(
    base: torch.Tensor,
    values: torch.Tensor,
    squares: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    tables: LevelTables,
    descent: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``column_sweep.sweep_columns``, of at most ``MAX_RUN`` columns; rows of ``base`` and ``values`` must be contiguous."""
    _, run, n = base.shape
    assert run <= MAX_RUN
    assert base.stride()[1:] == values.stride()[1:] == (n, 1)
    codes = torch.empty((run, n), dtype=torch.uint8, device=base.device)
    passed = torch.empty((base.shape[0], run, n), dtype=torch.float32, device=base.device)
    rule: SliceRule = tables.rule
    _sweep_kernel[(triton.cdiv(n, BLOCK_N),)](
        base, values, squares.contiguous(), scales.contiguous(), weights, codes, passed,
        run, n, base.stride(0), values.stride(0),
        NUM_PREFIXES=tables.narrow.shape[1], SPAN=codes_per_prefix(rule), SHIFT=bin_shift(rule), RUN=MAX_RUN, ROWS=BLOCK_N,
        DESCENT=descent, CURVED=rule == "curved", ROUND=rule == "round", num_warps=1,
    )  # fmt: skip
    return codes, passed
