"""The product for few rows on Hopper: y = x @ W.T, each row at its own width; x is made ready once per program.

A program has some tiles of 16 outputs at a time and a part of K. Its warps read words of the planes straight to registers, some
units ahead, as in kernels.gemm; x goes through shared memory (kernels.small_x), where all tiles find it. Rows whose width
``takes_digits`` (kernels.digits_ptx) are multiplied in integers, the others as numbers (kernels.small_products). Where there
are more tiles than programs have, programs take turns: words of the next tiles are read while the last ones are multiplied.

As in kernels.lanes, a lane holds words and sums as one-dimensional tensors, an element per thread. Warp w has tile w modulo
TILES, and unit w // TILES of every SHARES. Written in Gluon, Triton's language of explicit layouts.
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence
from math import lcm

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.digits_ptx import SmallCode
from matgptq_vllm.kernels.gemm import alone, load_tile, readable, with_slot
from matgptq_vllm.kernels.gluon_names import barrier, wait_and_let_next_start
from matgptq_vllm.kernels.lanes import bits_needed, factor, load_four, load_two
from matgptq_vllm.kernels.layout import PLANE_WIDTHS, UNIT_N
from matgptq_vllm.kernels.small_config import SmallConfig
from matgptq_vllm.kernels.small_output import (
    num_turns,
    share_sums,
    tile_of_columns,
    tile_of_pairs,
    tile_of_sums,
    write_turn,
)
from matgptq_vllm.kernels.small_products import tables, use_unit, use_unit_for_columns, use_unit_for_pairs
from matgptq_vllm.kernels.small_x import (
    copy_x,
    element_layout,
    flat,
    make_digits,
    num_scales,
    room,
    scales_for_columns,
    scales_for_lanes,
    takes_digits,
    units_at_once,
    view_as,
    widths_of,
    words_for_columns,
    words_for_lanes,
)


@triton.constexpr_function
def _depth_step(depths, shares):
    return max(depths) * shares


@triton.constexpr_function
def _mixed_depth(depths, rows):
    """Units that a warp reads ahead where rows have several widths."""
    return min(2, max(depths)) if rows <= 8 else 1


@gluon.jit
def _compute(
    x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, has, sum_widths, shared_x,
    first, last, units_k, m, n, n_padded, k, stride_x,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, DEPTH: gl.constexpr, ROOM: gl.constexpr, UNITS: gl.constexpr,
    EVEN: gl.constexpr, PDL: gl.constexpr, HAS_COLUMNS: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Products of units first to last for the program's tiles, TILES in each of its turns, written to y or the workspace.

    Args:
        HAS_COLUMNS: whether digits are side by side.
    """
    xs, pairs, x_scales = shared_x
    BITS: gl.constexpr = bits_needed(WIDTHS[len(WIDTHS) - 1], RULE)
    WARPS: gl.constexpr = TILES * SHARES
    TILES_M: gl.constexpr = (ROWS + 7) // 8
    LOW: gl.constexpr = min(ROWS, 8)
    DIGITS: gl.constexpr = takes_digits(WIDTHS[0], RULE, ROWS == 1)
    PAIRS: gl.constexpr = DIGITS and ROWS == 1
    COLUMNS: gl.constexpr = DIGITS and HAS_COLUMNS
    thread = gl.arange(0, 32 * WARPS, layout=element_layout(WARPS))
    lane, warp = thread % 32, thread // 32
    programs = gl.num_programs(1)
    turns = num_turns(n_padded, TILES)
    tile, start = gl.program_id(1) * TILES + warp % TILES, first + warp // TILES
    levels = tables(token_profiles, WIDTHS, RULE, ROWS == 1, WARPS, CODE)
    here = _addresses(planes, scales, tile, start, lane, units_k, GROUP)
    slots = ()
    for slot in gl.static_range(DEPTH):
        slots = slots + (
            _load(here, planes, scales, tile, start, slot * SHARES, last, lane, units_k, has, WIDTHS, RULE, GROUP, BITS,
            EVEN, CODE),
        )  # fmt: skip
    if PDL:
        # Weights are older than any kernel that may still run; x is not.
        wait_and_let_next_start()
    copy_x(xs, x_ptr, m, first, last, k, stride_x, ROWS, WARPS, ROOM)
    async_copy.wait_group(0)
    barrier()
    if DIGITS and len(WIDTHS) == 1:
        make_digits(
            xs, pairs, x_scales, token_profiles, profile_widths, m, WIDTHS, RULE, x_ptr.dtype.element_ty, ROWS,
            WARPS, ROOM, UNITS, CODE,
        )  # fmt: skip
        barrier()
    elif DIGITS:  # noqa: SIM102 - this is decided when the kernel is compiled
        if _any_digits(has, WIDTHS, RULE):
            make_digits(
                xs, pairs, x_scales, token_profiles, profile_widths, m, WIDTHS, RULE, x_ptr.dtype.element_ty,
                ROWS, WARPS, ROOM, UNITS, CODE,
            )  # fmt: skip
            barrier()
    if PAIRS:
        x_view = view_as(pairs, gl.int32, (ROOM // SHARES, SHARES, 4, 4, 4, 4))
        scale_view = view_as(x_scales, gl.float32, (ROOM // SHARES, SHARES, 1, 4, 1))
    elif COLUMNS:
        x_view = view_as(xs, gl.int32, (ROOM // SHARES, SHARES, 4, 4, 4, 2, 2))
        scale_view = view_as(x_scales, gl.float32, (ROOM // SHARES, SHARES, num_scales(ROWS) // 2, 2))
    else:
        x_view = view_as(xs, gl.int32, (ROOM // SHARES, SHARES, 4 * TILES_M, LOW, 4, 4))
        scale_view = view_as(x_scales, gl.float32, (ROOM // SHARES, SHARES, TILES_M, num_scales(ROWS) // TILES_M // 2, 2))
    steps = (last - first + SHARES * DEPTH - 1) // (SHARES * DEPTH)
    for turn in range(turns):
        totals = _no_sums(PAIRS, TILES_M, WARPS)
        unit = start
        for step in range(steps):
            # After the last step of a turn comes the first of the next; loads after the last of all would keep the end waiting.
            more = step + 1 < steps
            any_more = more | (turn + 1 < turns)
            unit = gl.where(more, unit + DEPTH * SHARES, start)
            tile = gl.where(more, tile, tile + programs * TILES)
            here = _addresses(planes, scales, tile, unit, lane, units_k, GROUP)
            for slot in gl.static_range(DEPTH):
                number = step * DEPTH + slot
                if PAIRS:
                    x = words_for_lanes(x_view.index(number), 4, 4, SHARES, TILES)
                    x_steps = scales_for_lanes(scale_view.index(number), 1, 1, SHARES, TILES)
                    totals = use_unit_for_pairs(slots[slot], levels[0], x, x_steps, totals, WIDTHS[0], RULE, GROUP, CODE)
                elif COLUMNS:
                    x = words_for_columns(x_view.index(number), 4, SHARES, TILES)
                    # The scales' room is for 8 rows.
                    x_steps = scales_for_columns(scale_view.index(number).slice(0, 2, dim=1), SHARES, TILES)
                    totals = (
                        use_unit_for_columns(slots[slot], levels[0], x, x_steps, totals[0], WIDTHS[0], RULE, GROUP, CODE),
                    )
                else:
                    x = words_for_lanes(x_view.index(number), 4 * TILES_M, LOW, SHARES, TILES)
                    x_steps = ()
                    if DIGITS:
                        x_steps = scales_for_lanes(scale_view.index(number), TILES_M, 2, SHARES, TILES)
                    for index in gl.static_range(len(WIDTHS)):
                        if len(WIDTHS) == 1:
                            totals = use_unit(
                                slots[slot], levels[index], x, x_steps, totals, (), WIDTHS[index], False, RULE, GROUP,
                                TILES_M, CODE
                            )  # fmt: skip
                        else:
                            if has[index]:
                                totals = use_unit(
                                    slots[slot], levels[index], x, x_steps, totals, sum_widths, WIDTHS[index], True,
                                    RULE, GROUP, TILES_M, CODE,
                                )  # fmt: skip
                if any_more:
                    slots = with_slot(
                        slots,
                        slot,
                        _load(
                            here, planes, scales, tile, unit, slot * SHARES, last, lane, units_k, has, WIDTHS, RULE, GROUP,
                            BITS, EVEN, CODE,
                        ),
                        DEPTH,
                    )  # fmt: skip
        if PAIRS:
            total = tile_of_pairs(totals, TILES, SHARES) * factor(RULE)
        elif COLUMNS:
            total = tile_of_columns(totals[0], lane, TILES, SHARES) * factor(RULE)
        else:
            total = tile_of_sums(totals, TILES_M, TILES, SHARES) * factor(RULE)
        write_turn(total, workspace, scales, bias, y_ptr, turn, m, n, n_padded, GROUP, HAS_BIAS, SPLIT, TILES, WARPS)


@gluon.jit
def _addresses(planes, scales, tile, unit, lane, units_k, GROUP: gl.constexpr):
    """Where a unit's words of each plane are, and its scales."""
    number = tile * units_k + unit
    pair, single = number * 128 + 4 * lane, number * 64 + 2 * lane
    GROUPS: gl.constexpr = 1 if GROUP == -1 else 128 // GROUP
    scale = number * (8 * GROUPS) + lane // 4
    if scales.dtype.element_ty.primitive_bitwidth == 16:
        scale_address = scales.to(gl.pointer_type(gl.int32), bitcast=True) + scale
    else:
        scale_address = scales + 2 * scale
    return (planes[0] + pair, planes[1] + single, planes[2] + single, planes[3] + pair, planes[4] + pair, scale_address)


@gluon.jit
def _load(
    here, planes, scales, tile, unit, AFTER: gl.constexpr, last, lane, units_k, has,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr, EVEN: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Words and scales of the unit AFTER units later. EVEN: there is one."""
    if EVEN and len(WIDTHS) == 1:
        result = _load_after(here, lane, AFTER, GROUP, BITS, CODE)
    else:
        wanted = unit + AFTER
        result = load_tile(planes, scales, tile, wanted, wanted < last, lane, units_k, has, WIDTHS, RULE, GROUP, BITS, CODE)
    return result


@gluon.jit
def _load_after(addresses, lane, AFTER: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr, CODE: gl.constexpr):
    """As ``gemm.load_tile``; a constant more in an address costs nothing."""
    words = load_four(addresses[0], AFTER * 128, CODE)
    if BITS >= 3:
        words = words + load_two(addresses[1], AFTER * 64, CODE)
    if BITS >= 4:
        words = words + load_two(addresses[2], AFTER * 64, CODE)
    if BITS >= 6:
        words = words + load_four(addresses[3], AFTER * 128, CODE)
    if BITS >= 8:
        words = words + load_four(addresses[4], AFTER * 128, CODE)
    pairs = ()
    if GROUP == -1:
        one = gl.full(lane.shape, 1.0, gl.float32, lane.type.layout)
        pairs = ((one, one),)
    else:
        GROUPS: gl.constexpr = 128 // GROUP
        for group in gl.static_range(GROUPS):
            pairs = pairs + (_scale_pair(addresses[5], (AFTER * GROUPS + group) * 8),)
    return (words, pairs)


@gluon.jit
def _scale_pair(address, AFTER: gl.constexpr):
    """As ``lanes.load_scales``."""
    if address.dtype.element_ty == gl.int32:
        result = (gl.load(address + AFTER),)
    else:
        result = (gl.load(address + 2 * AFTER), gl.load(address + (2 * AFTER + 1)))
    return result


@gluon.jit
def _no_sums(PAIRS: gl.constexpr, TILES_M: gl.constexpr, WARPS: gl.constexpr):
    """Zeros, as lanes hold sums."""
    zero = gl.full((32 * WARPS,), 0.0, gl.float32, element_layout(WARPS))
    sums = (zero, zero)
    if not PAIRS:
        sums = ()
        for _ in gl.static_range(TILES_M):
            sums = sums + ((zero, zero, zero, zero),)
    return sums


@gluon.jit
def _present(widths, WIDTHS: gl.constexpr):
    """Which of WIDTHS are among those of the rows."""
    has = ()
    for index in gl.static_range(len(WIDTHS)):
        has = has + (gl.max((widths == WIDTHS[index]).to(gl.int32), axis=0) > 0,)
    return has


@gluon.jit
def _any_digits(has, WIDTHS: gl.constexpr, RULE: gl.constexpr):
    """Whether there are rows that take digits; the first of WIDTHS does."""
    some = has[0]
    for index in gl.static_range(1, len(WIDTHS)):
        if takes_digits(WIDTHS[index], RULE, False):
            some = some | has[index]
    return some


@gluon.jit
def _widths_of_sums(token_profiles, profile_widths, m, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """For every 8 rows, widths of the two of which a lane has sums."""
    row = gl.arange(0, 32 * WARPS, layout=element_layout(WARPS)) % 4 * 2
    result = ()
    for tile in gl.static_range((ROWS + 7) // 8):
        even = widths_of(token_profiles, profile_widths, row + 8 * tile, m)
        result = result + ((even, widths_of(token_profiles, profile_widths, row + 8 * tile + 1, m)),)
    return result


@gluon.jit(do_not_specialize=["m", "units_k"])
def _small_kernel(
    x_ptr, plane0, plane1, plane2, plane3, plane4, scales, bias, y_ptr, workspace, locks, token_profiles, profile_widths,
    m, n, n_padded, k, units_k, stride_x,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, SHARE: gl.constexpr, EVEN: gl.constexpr,
    DEPTHS: gl.constexpr, TURNS: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Grid: (SPLIT, programs), those that share tiles side by side. TURNS: the most that a program takes; SHARE: the most units
    that it has; EVEN: all have as many, a multiple of SHARES times any of DEPTHS, which are per width."""
    WARPS: gl.constexpr = TILES * SHARES
    UNITS: gl.constexpr = units_at_once(SHARE, ROWS, WARPS)
    ROOM: gl.constexpr = room(SHARE, UNITS, _depth_step(DEPTHS, SHARES))
    planes = (plane0, plane1, plane2, plane3, plane4)
    first, last = gl.program_id(0) * units_k // SPLIT, (gl.program_id(0) + 1) * units_k // SPLIT
    xs = gl.allocate_shared_memory(gl.int32, [ROOM, ROWS * 64], flat(1))
    x_scales = gl.allocate_shared_memory(gl.float32, [ROOM, num_scales(ROWS)], flat(1))
    pairs = xs
    if ROWS == 1 and takes_digits(WIDTHS[0], RULE, True):
        pairs = gl.allocate_shared_memory(gl.int32, [ROOM, 256], flat(1))
    shared_x = (xs, pairs, x_scales)
    if len(WIDTHS) == 1:
        _compute(
            x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, (), (), shared_x, first,
            last, units_k, m, n, n_padded, k, stride_x, WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, ROWS, TILES, SHARES, DEPTHS[0],
            ROOM, UNITS, EVEN, PDL, ROWS == 4, CODE,
        )  # fmt: skip
    else:
        # Rows of one width have a loop of their own, which is half as long as that for rows of several.
        if ROWS == 1:
            only = gl.load(profile_widths + gl.load(token_profiles))
        else:
            rows = gl.arange(0, ROWS, layout=element_layout(WARPS))
            widths = widths_of(token_profiles, profile_widths, rows, m)
            widest = gl.max(widths, axis=0)
            only = gl.where(gl.min(gl.where(rows < m, widths, widest), axis=0) == widest, widest, 0)
            if only == 0:
                _compute(
                    x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, _present(widths, WIDTHS),
                    _widths_of_sums(token_profiles, profile_widths, m, ROWS, WARPS), shared_x, first, last, units_k,
                    m, n, n_padded, k, stride_x, WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, ROWS, TILES, SHARES,
                    _mixed_depth(DEPTHS, ROWS), ROOM, UNITS, EVEN, PDL, False, CODE,
                )  # fmt: skip
        for index in gl.static_range(len(WIDTHS)):
            if only == WIDTHS[index]:
                _compute(
                    x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, (), (), shared_x,
                    first, last, units_k, m, n, n_padded, k, stride_x, alone(WIDTHS[index]), RULE, GROUP, HAS_BIAS, SPLIT,
                    ROWS, TILES, SHARES, DEPTHS[index], ROOM, UNITS, EVEN, PDL, False, CODE,
                )  # fmt: skip
    if SPLIT > 1:
        share_sums(workspace, locks, scales, bias, y_ptr, m, n, n_padded, GROUP, HAS_BIAS, SPLIT, ROWS, TILES, WARPS, TURNS)


def small_gemm(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    config: SmallConfig,
    locks: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias, where row m of x meets the weights read at profile_widths[token_profiles[m]] bits.

    Args:
        x: bfloat16 or float16 [M, K] on a Hopper GPU, M at most ``config.rows``; rows may be strided.
        planes, scales, n, token_profiles, profile_widths, widths, locks, bias: as for ``gemm.sliced_gemm``.

    Returns:
        [M, N], dtype of x.
    """
    x = readable(x)
    m, k = x.shape
    y = x.new_empty(m, n)
    n_padded, units_k = scales.shape[0] * UNIT_N, planes[0].shape[1]
    split = min(config.split_k, units_k)
    workspace = x.new_empty((split, m, n_padded), dtype=torch.float32) if split > 1 else y
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    groups = n_padded // (UNIT_N * config.tiles)
    depths = config.depths_of(widths)
    even = units_k % (split * config.shares * lcm(*depths)) == 0
    programs = min(groups, config.programs)
    _small_kernel[(split, programs)](
        x, *given, scales, y if bias is None else bias, y, workspace, locks, token_profiles, profile_widths,
        m, n, n_padded, k, units_k, x.stride(0),
        WIDTHS=tuple(widths), RULE=rule, GROUP=group_size, HAS_BIAS=bias is not None, SPLIT=split, ROWS=config.rows,
        TILES=config.tiles, SHARES=config.shares, SHARE=-(-units_k // split), EVEN=even, DEPTHS=depths,
        TURNS=config.turns(n) if split > 1 else 1, PDL=config.pdl, CODE=SmallCode.of(x.dtype),
        num_warps=config.num_warps, maxnreg=config.max_registers, launch_pdl=config.pdl,
    )  # fmt: skip
    return y
