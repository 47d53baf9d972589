"""The fused matrix product: y = x @ W.T, each row at its own width, reading only the planes of the widest row present.

A program computes a tile of BLOCK_N outputs for BLOCK_M rows. Its warps share K, unit by unit (kernels.layout): a warp reads
words of its own units straight to registers, some units ahead and without shared memory, makes weights of them there and
multiplies them on the tensor cores. At the end the warps' sums are added, in order. Weights are the left operand, as they
come from registers: y.T = W @ x.T.

Which widths the rows have is read on the device. Words are read once; for every width that is there, weights are made of them
and meet the rows of that width, the other rows being 0. So a row's result does not depend on the other rows. It does depend
on the configuration, of which one is chosen per range of M (kernels.tuning).
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS, MIN_BLOCK_M, MIN_BLOCK_N, Config
from matgptq_vllm.kernels.lanes import (
    bits_needed,
    factor,
    load_scales,
    load_unit,
    multiply,
    num_terms,
    piece_weights,
    plain_scales,
    plain_weights,
    scales_of_weights,
)
from matgptq_vllm.kernels.lanes_ptx import LaneCode
from matgptq_vllm.kernels.layout import PAD_N, PLANE_WIDTHS, UNIT_K, UNIT_N, padded

_UNIT_K = tl.constexpr(UNIT_K)


@triton.jit
def _program_sums(
    x_ptr, planes, scales, sum_widths, has, lane_rows, first_tile, units_k, k, stride_x,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Sums over the program's units of K of its tile, as lanes hold them: four float32 per 16 outputs and 8 rows."""
    BITS: tl.constexpr = bits_needed(WIDTHS[len(WIDTHS) - 1], RULE)
    # x is read a unit ahead, unless that takes too many registers.
    AHEAD: tl.constexpr = TILES_M <= 2
    first, last = _share(units_k, SPLIT)
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    unit = first + thread // 32
    slots = ()
    for slot in tl.static_range(DEPTH):
        slots = slots + (
            _load_tiles(
                planes,
                scales,
                first_tile,
                unit + slot * WARPS,
                last,
                lane,
                units_k,
                has,
                WIDTHS,
                RULE,
                GROUP,
                BITS,
                TILES_N,
                CODE,
            ),
        )
    totals = _no_sums(WARPS, TILES_M * TILES_N)
    if PDL:
        # Weights are older than any kernel that may still run; x is not.
        gdc_wait()
        # Only now, as kernels.gluon_names.wait_and_let_next_start says.
        gdc_launch_dependents()
    ahead = _load_x(x_ptr, lane_rows, unit, last, lane, k, stride_x, EVEN_K, TILES_M)
    steps = tl.cdiv(last - first, WARPS * DEPTH)
    for step in tl.range(0, steps, num_stages=1):
        for slot in tl.static_range(DEPTH):
            if AHEAD:
                x = ahead
                ahead = _load_x(x_ptr, lane_rows, unit + (slot + 1) * WARPS, last, lane, k, stride_x, EVEN_K, TILES_M)
            else:
                x = _load_x(x_ptr, lane_rows, unit + slot * WARPS, last, lane, k, stride_x, EVEN_K, TILES_M)
            for index in tl.static_range(len(WIDTHS)):
                if len(WIDTHS) == 1:
                    totals = _use_unit(
                        slots[slot], x, totals, sum_widths, WIDTHS[index], False, RULE, GROUP, TILES_M, TILES_N, CODE
                    )
                else:
                    if has[index]:
                        totals = _use_unit(
                            slots[slot], x, totals, sum_widths, WIDTHS[index], True, RULE, GROUP, TILES_M, TILES_N, CODE
                        )
            # Loads after the last step would keep its end waiting.
            if step + 1 < steps:
                slots = with_slot(
                    slots,
                    slot,
                    _load_tiles(
                        planes,
                        scales,
                        first_tile,
                        unit + (DEPTH + slot) * WARPS,
                        last,
                        lane,
                        units_k,
                        has,
                        WIDTHS,
                        RULE,
                        GROUP,
                        BITS,
                        TILES_N,
                        CODE,
                    ),
                    DEPTH,
                )
        unit += WARPS * DEPTH
    return totals


@triton.constexpr_function
def alone(width):
    """A replica's widths, if it held this one only."""
    return (width,)


@triton.jit
def _no_sums(WARPS: tl.constexpr, COUNT: tl.constexpr):
    """Zeros, as lanes hold sums."""
    zero = tl.zeros((32 * WARPS,), tl.float32)
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + ((zero, zero, zero, zero),)
    return sums


@triton.jit
def _only_width(has, WIDTHS: tl.constexpr):
    """The width of all rows, or 0 if they have several or none."""
    only, count = 0, 0
    for index in tl.static_range(len(WIDTHS)):
        only = tl.where(has[index], WIDTHS[index], only)
        count += has[index].to(tl.int32)
    return tl.where(count == 1, only, 0)


@triton.jit
def with_slot(slots, SLOT: tl.constexpr, value, DEPTH: tl.constexpr):
    """The slots, one of them replaced."""
    result = ()
    for index in tl.static_range(DEPTH):
        result = result + (value if index == SLOT else slots[index],)
    return result


@triton.jit
def _share(units_k, SPLIT: tl.constexpr):
    """First and end of this program's units of K."""
    split = tl.program_id(2)
    return split * units_k // SPLIT, (split + 1) * units_k // SPLIT


@triton.jit
def _load_tiles(
    planes, scales, first_tile, unit, last, lane, units_k, has,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TILES_N: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    tiles = ()
    for index in tl.static_range(TILES_N):
        tiles = tiles + (
            load_tile(
                planes,
                scales,
                first_tile + index,
                unit,
                unit < last,
                lane,
                units_k,
                has,
                WIDTHS,
                RULE,
                GROUP,
                BITS,
                CODE,
            ),
        )
    return tiles


@triton.jit
def load_tile(
    planes, scales, tile, unit, mask, lane, units_k, has,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Words and scales of a unit: (words, scales of outputs g and g + 8 per group). Scales of no unit are 0."""
    mask3 = _needed(mask, has, WIDTHS, RULE, 3)
    mask4 = _needed(mask, has, WIDTHS, RULE, 4)
    mask6 = _needed(mask, has, WIDTHS, RULE, 6)
    mask8 = _needed(mask, has, WIDTHS, RULE, 8)
    words = load_unit(planes, tile * units_k + unit, lane, mask, mask3, mask4, mask6, mask8, BITS, CODE)
    pairs = ()
    if GROUP == -1:
        one = mask.to(tl.float32)
        pairs = ((one, one),)
    else:
        GROUPS: tl.constexpr = _UNIT_K // GROUP
        for group in tl.static_range(GROUPS):
            pairs = pairs + (load_scales(scales, ((tile * units_k + unit) * GROUPS + group) * 8 + lane // 4, mask),)
    return (words, pairs)


@triton.jit
def _needed(mask, has, WIDTHS: tl.constexpr, RULE: tl.constexpr, BITS: tl.constexpr):
    """``mask``, if a width that is there needs BITS bits or more."""
    if len(WIDTHS) > 1:
        needed = mask & False
        for index in tl.static_range(len(WIDTHS)):
            if bits_needed(WIDTHS[index], RULE) >= BITS:
                needed = needed | (mask & has[index])
        mask = needed
    return mask


@triton.jit
def _load_x(x_ptr, rows, unit, last, lane, k, stride_x, EVEN_K: tl.constexpr, TILES_M: tl.constexpr):
    """A lane's part of x for a unit: for each of four pieces and every 8 rows, four words."""
    # A warp may have fewer units than others. Its scales are 0 then, but x must be numbers.
    column = tl.minimum(unit, last - 1) * (_UNIT_K // 2) + lane % 4
    x = ()
    for piece in tl.static_range(4):
        words = ()
        for tile in tl.static_range(TILES_M):
            start = x_ptr + rows[tile] * (stride_x // 2) + column
            own = ()
            for eight in tl.static_range(piece * 16, piece * 16 + 16, 4):
                if EVEN_K:
                    own = own + (tl.load(start + eight),)
                else:
                    own = own + (tl.load(start + eight, mask=column + eight < k // 2, other=0),)
            words = words + (own,)
        x = x + (words,)
    return x


@triton.jit
def _use_unit(
    tiles, x, totals, sum_widths,
    WIDTH: tl.constexpr, SEVERAL: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr,
    TILES_M: tl.constexpr, TILES_N: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """totals plus the products of a unit, its weights read at WIDTH; only for rows of that width if there are several."""
    PIECES: tl.constexpr = 4 if GROUP == -1 else GROUP // 32
    zero = tl.zeros_like(totals[0][0])
    for group in tl.static_range(4 // PIECES):
        sums = ()
        for _ in tl.static_range(TILES_M * TILES_N):
            sums = sums + ((zero, zero, zero, zero),)
        for part in tl.static_range(PIECES):
            result = ()
            for tile_n in tl.static_range(TILES_N):
                pairs = piece_weights(tiles[tile_n][0], group * PIECES + part, WIDTH, RULE, CODE)
                for tile_m in tl.static_range(TILES_M):
                    result = result + (
                        multiply(
                            pairs,
                            x[group * PIECES + part][tile_m],
                            sums[tile_n * TILES_M + tile_m],
                            num_terms(WIDTH, RULE),
                            part == 0,
                            CODE,
                        ),
                    )
            sums = result
        scaled = ()
        for tile_n in tl.static_range(TILES_N):
            upper, lower = scales_of_weights(tiles[tile_n][1][group], WIDTH, RULE, CODE)
            for tile_m in tl.static_range(TILES_M):
                total, part_sums = totals[tile_n * TILES_M + tile_m], sums[tile_n * TILES_M + tile_m]
                scaled = scaled + (add_scaled(total, part_sums, upper, lower, sum_widths[tile_m], WIDTH, SEVERAL),)
        totals = scaled
    return totals


@triton.jit
def add_scaled(total, sums, upper, lower, widths, WIDTH: tl.constexpr, SEVERAL: tl.constexpr):
    """A lane's four sums, scaled, added to its totals; those of rows that have another width stay."""
    first, second = total[0] + sums[0] * upper, total[1] + sums[1] * upper
    third, fourth = total[2] + sums[2] * lower, total[3] + sums[3] * lower
    if SEVERAL:
        even, odd = widths[0] == WIDTH, widths[1] == WIDTH
        first, second = tl.where(even, first, total[0]), tl.where(odd, second, total[1])
        third, fourth = tl.where(even, third, total[2]), tl.where(odd, fourth, total[3])
    return (first, second, third, fourth)


@triton.jit
def _as_tiles(totals, TILES_M: tl.constexpr, TILES_N: tl.constexpr, WARPS: tl.constexpr):
    """Sums as lanes hold them -> [WARPS, 16 * TILES_N, 8 * TILES_M]."""
    rows_of_tiles = ()
    for tile_n in tl.static_range(TILES_N):
        tiles = ()
        for tile_m in tl.static_range(TILES_M):
            sums = totals[tile_n * TILES_M + tile_m]
            upper, lower = tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3])
            # warp, g, j, odd row, output + 8
            lanes = tl.join(upper, lower).reshape(WARPS, 8, 4, 2, 2)
            tiles = tiles + (lanes.permute(0, 4, 1, 2, 3).reshape(WARPS, 16, 8),)
        rows_of_tiles = rows_of_tiles + (_side_by_side(tiles, TILES_M, WARPS, 16),)
    if TILES_N == 1:
        result = rows_of_tiles[0]
    elif TILES_N == 2:
        result = tl.join(rows_of_tiles[0], rows_of_tiles[1]).permute(0, 3, 1, 2).reshape(WARPS, 32, 8 * TILES_M)
    else:
        pairs = tl.join(tl.join(rows_of_tiles[0], rows_of_tiles[1]), tl.join(rows_of_tiles[2], rows_of_tiles[3]))
        result = pairs.permute(0, 4, 3, 1, 2).reshape(WARPS, 64, 8 * TILES_M)
    return result


@triton.jit
def _side_by_side(tiles, TILES: tl.constexpr, WARPS: tl.constexpr, N: tl.constexpr):
    """TILES tiles [WARPS, N, 8] as one, [WARPS, N, 8 * TILES]."""
    if TILES == 1:
        result = tiles[0]
    elif TILES == 2:
        result = tl.join(tiles[0], tiles[1]).permute(0, 1, 3, 2).reshape(WARPS, N, 16)
    else:
        result = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))
        result = result.permute(0, 1, 4, 3, 2).reshape(WARPS, N, 32)
    return result


@triton.jit
def _plain_sums(
    x_ptr, planes, scales, row_widths, rows, row_mask, first_tile, first, last, units_k, k,
    stride_x, WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What ``_program_sums`` adds up to, [BLOCK_N, BLOCK_M], in plain Triton for its interpreter."""
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    outputs = first_tile * 16 + tl.arange(0, BLOCK_N)
    SIZE: tl.constexpr = _UNIT_K if GROUP == -1 else GROUP
    for start in tl.range(first * _UNIT_K, last * _UNIT_K, SIZE):
        columns = start + tl.arange(0, SIZE)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for index in tl.static_range(len(WIDTHS)):
            mask = row_mask[None, :] & (columns < k)[:, None]
            if len(WIDTHS) > 1:
                mask = mask & (row_widths == WIDTHS[index])[None, :]
            x = tl.load(x_ptr + rows[None, :] * stride_x + columns[:, None], mask=mask, other=0.0).to(tl.float32)
            weight = plain_weights(planes, outputs[:, None], columns[None, :], units_k, WIDTHS[index], RULE)
            part += tl.dot(weight / factor(RULE), x, input_precision="ieee")
        if GROUP != -1:
            groups = units_k * (_UNIT_K // SIZE)
            part *= plain_scales(scales, outputs, start // SIZE, groups)[:, None]
        total += part
    return total


@triton.jit(do_not_specialize=["m", "units_k"])
def _gemm_kernel(
    x_ptr, plane0, plane1, plane2, plane3, plane4, scales, bias, y_ptr, workspace, locks,
    token_profiles, profile_widths, row_order, done_width,
    m, n, n_padded, k, units_k, stride_x,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    ORDERED: tl.constexpr, SOME_DONE: tl.constexpr, SPLIT: tl.constexpr, TILES_M: tl.constexpr, TILES_N: tl.constexpr,
    WARPS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, tiles of outputs, SPLIT), row tiles fastest, so that those that read the same planes run together."""
    planes = (plane0, plane1, plane2, plane3, plane4)
    BLOCK_M: tl.constexpr = 8 * TILES_M
    BLOCK_N: tl.constexpr = 16 * TILES_N
    row_tile = tl.program_id(0)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    rows, row_mask = _ordered(row_order, rows, row_mask, m, ORDERED)
    row_widths = rows
    has = ()
    if len(WIDTHS) > 1:
        row_widths, row_mask = widths_of(token_profiles, profile_widths, done_width, rows, row_mask, SOME_DONE)
        for index in tl.static_range(len(WIDTHS)):
            has = has + (tl.max((row_widths == WIDTHS[index]).to(tl.int32), 0) > 0,)
    if CODE is None:
        first, last = _share(units_k, SPLIT)
        total = _plain_sums(
            x_ptr, planes, scales, row_widths, rows, row_mask, tl.program_id(1) * TILES_N,
            first, last, units_k, k, stride_x, WIDTHS, RULE, GROUP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        # Of every 8 rows, a lane reads its part of one of x, and has sums of two.
        lane = tl.arange(0, 32 * WARPS) % 32
        lane_rows, sum_widths = (), ()
        for tile in tl.static_range(TILES_M):
            lane_row = row_tile * BLOCK_M + 8 * tile + lane // 4
            lane_row, lane_mask = _ordered(row_order, lane_row, lane_row < m, m, ORDERED)
            # Rows that do not exist may have any result; reading the first is as good.
            lane_rows = lane_rows + (tl.where(lane_mask, lane_row, 0).to(tl.int64),)
            widths = ()
            if len(WIDTHS) > 1:
                for odd in tl.static_range(2):
                    sum_row = row_tile * BLOCK_M + 8 * tile + lane % 4 * 2 + odd
                    sum_row, sum_mask = _ordered(row_order, sum_row, sum_row < m, m, ORDERED)
                    width, _ = widths_of(token_profiles, profile_widths, done_width, sum_row, sum_mask, SOME_DONE)
                    widths = widths + (width,)
            sum_widths = sum_widths + (widths,)
        words = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        first_tile = tl.program_id(1) * TILES_N
        if len(WIDTHS) == 1:
            sums = _program_sums(
                words, planes, scales, sum_widths, has, lane_rows, first_tile, units_k, k,
                stride_x, WIDTHS, RULE, GROUP, EVEN_K, SPLIT, TILES_M, TILES_N, WARPS, DEPTH, PDL, CODE,
            )  # fmt: skip
        else:
            # Rows of one width have a loop of their own, which is half as long as that for rows of several.
            only = _only_width(has, WIDTHS)
            if only == 0:
                sums = _program_sums(
                    words, planes, scales, sum_widths, has, lane_rows, first_tile, units_k, k,
                    stride_x, WIDTHS, RULE, GROUP, EVEN_K, SPLIT, TILES_M, TILES_N, WARPS, DEPTH, PDL, CODE,
                )  # fmt: skip
            else:
                sums = _no_sums(WARPS, TILES_M * TILES_N)
            for index in tl.static_range(len(WIDTHS)):
                if only == WIDTHS[index]:
                    sums = _program_sums(
                        words, planes, scales, sum_widths, has, lane_rows, first_tile, units_k,
                        k, stride_x, alone(WIDTHS[index]), RULE, GROUP, EVEN_K, SPLIT, TILES_M, TILES_N, WARPS, DEPTH, PDL,
                        CODE,
                    )  # fmt: skip
        parts = _as_tiles(sums, TILES_M, TILES_N, WARPS)
        total = tl.sum(parts, 0)
    _put(
        total, scales, bias, y_ptr, workspace, locks, rows, row_mask, m, n, n_padded, RULE, GROUP, HAS_BIAS, SPLIT, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@triton.jit
def _put(
    total, scales, bias, y_ptr, workspace, locks, rows, row_mask, m, n, n_padded,
    RULE: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the sums of a tile [BLOCK_N, BLOCK_M]; if K is split, the last program to arrive does, for all."""
    tile = tl.program_id(1)
    total *= factor(RULE)
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out = rows[None, :].to(tl.int64) * n + outputs[:, None]
    out_mask = row_mask[None, :] & (outputs < n)[:, None]
    if SPLIT > 1:
        # Every program leaves its sum; the last one to arrive adds them, always in the order of K.
        place = rows[None, :].to(tl.int64) * n_padded + outputs[:, None]
        share = m.to(tl.int64) * n_padded
        lock = locks + tile * tl.num_programs(0) + tl.program_id(0)
        tl.store(workspace + tl.program_id(2) * share + place, total, mask=row_mask[None, :])
        tl.debug_barrier()
        arrived = tl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLIT):
                total += tl.load(workspace + other * share + place, mask=row_mask[None, :], cache_modifier=".cg")
            tl.store(lock, 0)
            _finish(total, scales, bias, y_ptr, outputs, out, out_mask, n, GROUP, HAS_BIAS)
    else:
        _finish(total, scales, bias, y_ptr, outputs, out, out_mask, n, GROUP, HAS_BIAS)


@triton.jit
def _ordered(row_order, rows, mask, m, ORDERED: tl.constexpr):
    """Rows by their place in the order, and which of them exist."""
    if ORDERED:
        rows = tl.load(row_order + rows, mask=mask, other=0)
        # Whatever the order holds, nothing outside of x and y is touched.
        mask = mask & (rows < m)
    return rows, mask


@triton.jit
def widths_of(token_profiles, profile_widths, done_width, rows, mask, SOME_DONE: tl.constexpr):
    """Widths of rows, 0 for those that have none here, and which have one."""
    profiles = tl.load(token_profiles + rows, mask=mask, other=0)
    widths = tl.load(profile_widths + profiles, mask=mask, other=0)
    if SOME_DONE:
        mask = mask & (widths != tl.load(done_width))
        widths = tl.where(mask, widths, 0)
    return widths, mask


@triton.jit
def _finish(total, scales, bias, y_ptr, outputs, out, out_mask, n, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr):
    if GROUP == -1:
        total *= plain_scales(scales, outputs, 0, 1)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < n, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=out_mask)


def sliced_gemm(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    config: Config,
    locks: torch.Tensor,
    row_order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    done: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x @ W.T + bias, where row m of x meets the weights read at profile_widths[token_profiles[m]] bits.

    Args:
        x: bfloat16 or float16 [M, K] on a GPU (any floating type in Triton's interpreter); rows may be strided.
        planes: leading kernel planes (kernels.layout), enough for the widest of ``widths``.
        scales: floating, kernel layout.
        n: outputs.
        token_profiles: int32 [at least M].
        profile_widths: int32 [number of profiles].
        widths: every width that ``profile_widths`` may hold, ascending. With one, nothing is looked up.
        locks: int32, at least ``num_locks(...)``, all 0; they are 0 again afterwards. Products that may overlap in time must
            not share them.
        row_order: int32 [at least M]: a permutation of 0..M-1 that brings rows of one width together. It changes speed only.
        bias: [N], any floating type.
        done: a width, int32 with one element on the device, and the result [M, N], in which the rows of that width are
            there already; the others are filled in. Only with several ``widths``.

    Returns:
        [M, N], dtype of x.
    """
    x = readable(x)
    m, k = x.shape
    y = x.new_empty(m, n) if done is None else done[1]
    n_padded, units_k = scales.shape[0] * UNIT_N, planes[0].shape[1]
    split = min(config.split_k, units_k)
    workspace = x.new_empty((split, m, n_padded), dtype=torch.float32) if split > 1 else y
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    code = lane_code(x)
    pdl = config.pdl and code is not None
    grid = (-(-m // config.block_m), n_padded // config.block_n, split)
    _gemm_kernel[grid](
        x, *given, scales, y if bias is None else bias, y, workspace, locks, token_profiles, profile_widths,
        token_profiles if row_order is None else row_order, token_profiles if done is None else done[0],
        m, n, n_padded, k, units_k, x.stride(0),
        WIDTHS=tuple(widths), RULE=rule, GROUP=group_size, EVEN_K=k % UNIT_K == 0, HAS_BIAS=bias is not None,
        ORDERED=row_order is not None and m > config.block_m, SOME_DONE=done is not None, SPLIT=split,
        TILES_M=config.block_m // MIN_BLOCK_M, TILES_N=config.block_n // UNIT_N, WARPS=config.num_warps, DEPTH=config.depth,
        PDL=pdl, CODE=code, num_warps=config.num_warps, maxnreg=config.max_registers, launch_pdl=pdl,
    )  # fmt: skip
    return y


def readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` such that the kernel may read 8 columns at a time: a copy if addresses of rows are no multiples of 16 bytes."""
    k = x.shape[1]
    if k % 8:
        return torch.nn.functional.pad(x, (0, padded(k, 8) - k))
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def lane_code(x: torch.Tensor) -> LaneCode | None:
    """The assembly for products with ``x``; None where only plain Triton runs."""
    if x.device.type != "cuda" or torch.version.cuda is None:
        return None
    return LaneCode.of(x.dtype)


def num_locks(n: int) -> int:
    """Locks that a layer with ``n`` outputs needs."""
    return padded(n, PAD_N) // MIN_BLOCK_N * MAX_SPLIT_ROWS // MIN_BLOCK_M
