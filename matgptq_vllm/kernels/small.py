"""The product for up to 16 rows on Hopper: y = x @ W.T, each row at its own width; x is made ready once per program.

A program has some tiles of 16 outputs and a part of K. Its warps read words of the planes straight to registers, some units ahead,
as in kernels.gemm; x goes through shared memory, where all tiles find it, in the order in which a lane needs it. Rows whose
width ``takes_digits`` (kernels.digits_ptx) are there as two digits per number, and are multiplied in integers; the others as they
are.

    shared memory, words of 4 bytes    [unit, piece, row, j, 4]    the 8 numbers of columns 8j on of a piece: two of 16 bits per
                                                                   word, or upper digits (2 words) and lower digits
    scales of x, float32               [unit, 8 or 16 rows]        level unit times step, for rows of digits

As in kernels.lanes, a lane holds words and sums as one-dimensional tensors, an element per thread. Warp w has tile w modulo the
number of tiles. Written in Gluon, Triton's language of explicit layouts.
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence
from math import lcm

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels import digits_ptx, small_config
from matgptq_vllm.kernels.digits_ptx import DIGIT_STEPS, SUM_START, SmallCode
from matgptq_vllm.kernels.gemm import add_scaled, load_tile, readable, with_slot
from matgptq_vllm.kernels.lanes import bits_needed, both_scales, factor, load_four, load_two, multiply, num_terms, piece_weights, place_of
from matgptq_vllm.kernels.layout import PLANE_WIDTHS, UNIT_N
from matgptq_vllm.kernels.small_config import SmallConfig

# Triton 3.6 has other names than later releases.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_STEPS = gl.constexpr(float(DIGIT_STEPS))
_SUM_START = gl.constexpr(SUM_START)
_LOWER_START = gl.constexpr(SUM_START * (1.0 + 1.0 / 256.0))
_TINY = gl.constexpr(0x0DA24260)  # 1e-30: what is less than it times 127 counts as zero

takes_digits = triton.constexpr_function(digits_ptx.takes_digits)


@triton.constexpr_function
def _level_bytes(code, width, half, rule, paired):
    return code.level_bytes(width, half, rule, paired)


@triton.constexpr_function
def _num_level_words(code, width, rule):
    return len(code.level_words(width, rule))


@triton.constexpr_function
def _level_word(code, width, rule, place):
    return code.level_words(width, rule)[place]


@triton.constexpr_function
def _digit_product(code, first):
    return code.digit_product(first)


@triton.constexpr_function
def _digit_words(code):
    return code.digit_words()


@triton.constexpr_function
def _unit_scale(code, width, rule):
    return code.unit_scale(width, rule)


@triton.constexpr_function
def _alone(width):
    return (width,)


@triton.constexpr_function
def _paired(rows, per):
    """Whether the sums of digits are of pairs of outputs: see ``_pair_sums``."""
    return per == 2 and rows <= 4


@triton.constexpr_function
def _num_scales(rows):
    return max(rows, 8)


@triton.constexpr_function
def _element_layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0])


@triton.constexpr_function
def _lanes_layout(shares, tiles, rows, before, last):
    """[shares, tiles, before, 8 / rows, rows, 4, last]: one element per lane 4g + j of ``before`` and ``last``, g = two axes."""
    low = min(rows, 8)
    shape = [shares, tiles, before, 8 // low, low, 4, last]

    def bases(axis):
        return [[1 << bit if place == axis else 0 for place in range(7)] for bit in range(shape[axis].bit_length() - 1)]

    lanes, warps = bases(5) + bases(4) + bases(3), bases(1) + bases(0)
    return gl.DistributedLinearLayout(bases(6) + bases(2), lanes, warps, [], shape)


@triton.constexpr_function
def _units_at_once(share, rows, warps):
    """Units of K of which x is made ready at once: at most 64 numbers per thread."""
    units = max(2 * warps // rows, 1)
    while units < share and units * 2 * rows <= 16 * warps:
        units *= 2
    return units


@triton.constexpr_function
def _room(share, at_once, shares):
    """Units in shared memory: whole steps of all loops, and whole parts made ready at once."""
    step = max(at_once, shares * small_config.MAX_DEPTH)
    return -(-share // step) * step


@gluon.jit
def _halves(given, THREADS: gl.constexpr, HALF: gl.constexpr):
    """[THREADS, 2 * HALF] -> two [THREADS, HALF]."""
    return gl.split(gl.permute(gl.reshape(given, (THREADS, 2, HALF)), (0, 2, 1)))


@gluon.jit
def _parts(given, THREADS: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """[THREADS, COUNT], a thread's elements in a row -> COUNT tensors [THREADS]."""
    parts = (gl.reshape(given, (THREADS, COUNT)),)
    for level in gl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for index in gl.static_range(len(parts)):
            halves = halves + _halves(parts[index], THREADS, COUNT >> (level + 1))
        parts = halves
    result = ()
    for index in gl.static_range(len(parts)):
        result = result + (gl.convert_layout(gl.reshape(parts[index], (THREADS,)), LAYOUT, assert_trivial=True),)
    return result


@gluon.jit
def _for_lanes(shared, BEFORE: gl.constexpr, LAST: gl.constexpr, ROWS: gl.constexpr, SHARES: gl.constexpr, TILES: gl.constexpr):
    """Shared memory [SHARES, BEFORE, rows (at most 8), 4, LAST] -> BEFORE * LAST tensors, an element per thread."""
    LAYOUT: gl.constexpr = _lanes_layout(SHARES, TILES, ROWS, BEFORE, LAST)
    LOW: gl.constexpr = min(ROWS, 8)
    WARPS: gl.constexpr = SHARES * TILES
    found = shared.load(gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    found = gl.expand_dims(gl.expand_dims(found, 1), 3)
    zeros = gl.full((SHARES, TILES, BEFORE, 8 // LOW, LOW, 4, LAST), 0, found.dtype, LAYOUT)
    found, _ = gl.broadcast(found, zeros)
    found = gl.permute(found, (0, 1, 3, 4, 5, 2, 6))
    return _parts(found, 32 * WARPS, BEFORE * LAST, _element_layout(WARPS))


@gluon.jit
def _scales_for_lanes(shared, BEFORE: gl.constexpr, LAST: gl.constexpr, SHARES: gl.constexpr, TILES: gl.constexpr):
    """Shared memory [SHARES, BEFORE, 4, LAST] -> BEFORE * LAST tensors, an element per thread."""
    LAYOUT: gl.constexpr = _lanes_layout(SHARES, TILES, 8, BEFORE, LAST)
    WARPS: gl.constexpr = SHARES * TILES
    found = shared.load(gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))))
    found = gl.expand_dims(gl.expand_dims(gl.expand_dims(found, 1), 3), 4)
    zeros = gl.full((SHARES, TILES, BEFORE, 1, 8, 4, LAST), 0.0, gl.float32, LAYOUT)
    found, _ = gl.broadcast(found, zeros)
    found = gl.permute(found, (0, 1, 3, 4, 5, 2, 6))
    return _parts(found, 32 * WARPS, BEFORE * LAST, _element_layout(WARPS))


@gluon.jit
def _greater_pair(first, second):
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", (first, second), gl.int32, True, 1)


@gluon.jit
def _number(bits, DTYPE: gl.constexpr):
    """What the low 16 bits are in a type, float32, at least a number that is too small to matter."""
    if DTYPE == gl.bfloat16:
        wide = bits << 16
    else:
        wide = bits.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32).to(gl.int32, bitcast=True)
    return gl.maximum(wide, _TINY).to(gl.float32, bitcast=True)


@gluon.jit
def _prepare(
    xs, pair_xs, x_scales, x_ptr, token_profiles, profile_widths, m, first, last, k, stride_x,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, ROOM: gl.constexpr, UNITS: gl.constexpr,
    SCALES: gl.constexpr, PAIRED: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Bring x of units first to last into shared memory, UNITS at once; what is beyond is 0."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    PAIRS: gl.constexpr = UNITS * ROWS
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    row = pair % ROWS
    exists = row < m
    if len(WIDTHS) > 1:
        width = _widths_of(token_profiles, profile_widths, row, m)
        in_digits = width < 0
        unit_scale = gl.full((PAIRS,), 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
        for index in gl.static_range(len(WIDTHS)):
            if takes_digits(WIDTHS[index], RULE):
                in_digits = in_digits | (width == WIDTHS[index])
                unit_scale = gl.where(width == WIDTHS[index], _unit_scale(CODE, WIDTHS[index], RULE), unit_scale)
    else:
        unit_scale = gl.full((PAIRS,), _unit_scale(CODE, WIDTHS[0], RULE), gl.float32, gl.SliceLayout(1, LAYOUT))
    start = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + row.to(gl.int64) * (stride_x // 2)
    for number in range(ROOM // UNITS):
        unit = first + number * UNITS + pair // ROWS
        columns = unit[:, None] * 64 + column[None, :]
        words = gl.load(start[:, None] + columns, mask=(exists & (unit < last))[:, None] & (columns < k // 2), other=0)
        if takes_digits(WIDTHS[0], RULE):
            # As integers, NaN is the greatest, so that it is not lost.
            greatest = gl.reduce(words & 0x7FFF7FFF, 1, _greater_pair)
            greatest = _number(gl.maximum(greatest >> 16, greatest & 0xFFFF), x_ptr.dtype.element_ty)
            inverse = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", (greatest,), gl.float32, True, 1)
            assembly: gl.constexpr = _digit_words(CODE)
            steps, _ = gl.broadcast((inverse * _STEPS)[:, None], words)
            digits = gl.inline_asm_elementwise(assembly[0], assembly[1], (words, steps), gl.int32, True, 4)
            if PAIRED:
                apart = _apart(digits, UNITS, ROWS)
                pair_xs._reinterpret(gl.int32, (ROOM // UNITS, UNITS, 4, 4 * ROWS, 4, 4), _flat(5)).index(number).store(apart)
                # Of upper and lower digits.
                both = gl.join(greatest * unit_scale, greatest * (unit_scale * (1.0 / 256.0)))
                both = gl.reshape(both, (UNITS, 2 * ROWS))
                view = x_scales._reinterpret(gl.float32, (ROOM // UNITS, UNITS, SCALES), _flat(2)).index(number)
                view.slice(0, 2 * ROWS, dim=1).store(both)
            else:
                if len(WIDTHS) > 1:
                    words = gl.where(in_digits[:, None], digits, words)
                else:
                    words = digits
                view = x_scales._reinterpret(gl.float32, (ROOM // UNITS, UNITS, SCALES), _flat(2)).index(number)
                view.slice(0, ROWS, dim=1).store(gl.reshape(greatest * unit_scale, (UNITS, ROWS)))
        if not PAIRED or not takes_digits(WIDTHS[len(WIDTHS) - 1], RULE):
            words = gl.permute(gl.reshape(words, (UNITS, ROWS, 4, 4, 4)), (0, 2, 1, 3, 4))
            xs._reinterpret(gl.int32, (ROOM // UNITS, UNITS, 4, ROWS, 4, 4), _flat(5)).index(number).store(words)


@gluon.jit
def _apart(digits, UNITS: gl.constexpr, ROWS: gl.constexpr):
    """Words of digits -> [UNITS, piece, (row, digit, output + 8), j, (columns 0-3 or 4-7, odd columns)], see ``_pair_sums``."""
    digits = gl.reshape(digits, (UNITS, ROWS, 4, 4, 2, 2))
    upper = gl.join(digits & 0x00FF00FF, (digits >> 8) & 0x00FF00FF)
    lower = gl.join((digits << 8) & -0x00FF0100, digits & -0x00FF0100)
    # unit, row, piece, j, digit, half, odd, output + 8
    words = gl.permute(gl.join(upper, lower), (0, 2, 1, 4, 7, 3, 5, 6))
    return gl.reshape(words, (UNITS, 4, 4 * ROWS, 4, 4))


@triton.constexpr_function
def _flat(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(reversed(range(rank))))


@gluon.jit
def _compute(
    x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, has, sum_widths, xs, pair_xs, x_scales, first, last,
    units_k, m, n, n_padded, k, stride_x,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    ROWS: gl.constexpr, PER: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, DEPTH: gl.constexpr, ROOM: gl.constexpr, UNITS: gl.constexpr,
    EVEN: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Products of units first to last for the program's tiles, TILES in each of its turns, written to y or the workspace."""
    BITS: gl.constexpr = bits_needed(WIDTHS[len(WIDTHS) - 1], RULE)
    WARPS: gl.constexpr = TILES * SHARES
    TILES_M: gl.constexpr = (ROWS + 7) // 8
    LOW: gl.constexpr = min(ROWS, 8)
    PAIRED: gl.constexpr = _paired(ROWS, PER)
    COLUMNS: gl.constexpr = max(ROWS // 2, 1)
    SCALES: gl.constexpr = _num_scales(ROWS)
    DIGITS: gl.constexpr = takes_digits(WIDTHS[0], RULE)
    NUMBERS: gl.constexpr = not takes_digits(WIDTHS[len(WIDTHS) - 1], RULE)
    thread = gl.arange(0, 32 * WARPS, layout=_element_layout(WARPS))
    lane, warp = thread % 32, thread // 32
    programs = gl.num_programs(0)
    turns = _turns(n_padded, TILES * PER)
    # A warp has PER adjacent tiles.
    tile, start = (gl.program_id(0) * TILES + warp % TILES) * PER, first + warp // TILES
    tables = _tables(token_profiles, WIDTHS, RULE, WARPS, CODE)
    from_here = _addresses(planes, scales, tile, start, lane, units_k, GROUP, PER)
    slots = ()
    for slot in gl.static_range(DEPTH):
        slots = slots + (
            _load_tiles(
                from_here, planes, scales, tile, start, slot * SHARES, last, lane, units_k, has, WIDTHS, RULE, GROUP, BITS, PER, EVEN,
                CODE,
            ),
        )  # fmt: skip
    if PDL:
        # Weights are older than any kernel that may still run; x is not.
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", (), gl.int32, False, 1)
    _prepare(
        xs, pair_xs, x_scales, x_ptr, token_profiles, profile_widths, m, first, last, k, stride_x, WIDTHS, RULE, ROWS, WARPS, ROOM,
        UNITS, SCALES, PAIRED, CODE,
    )  # fmt: skip
    _barrier()
    x_view = xs._reinterpret(gl.int32, (ROOM // SHARES, SHARES, 4 * TILES_M, LOW, 4, 4), _flat(5))
    if PAIRED:
        pair_view = pair_xs._reinterpret(gl.int32, (ROOM // SHARES, SHARES, 4 * COLUMNS, min(4 * ROWS, 8), 4, 4), _flat(5))
        scale_view = x_scales._reinterpret(gl.float32, (ROOM // SHARES, SHARES, COLUMNS, 4, 1), _flat(4))
    else:
        scale_view = x_scales._reinterpret(gl.float32, (ROOM // SHARES, SHARES, TILES_M, 4, 2), _flat(4))
    steps = (last - first + SHARES * DEPTH - 1) // (SHARES * DEPTH)
    for turn in range(turns):
        totals = _no_sums(PER * TILES_M, WARPS)
        pair_totals = _no_sums(COLUMNS, WARPS)
        unit = start
        for step in range(steps):
            # After the last step of a turn comes the first of the next; loads after the last of all would keep the end waiting.
            more = step + 1 < steps
            any_more = more | (turn + 1 < turns)
            unit = gl.where(more, unit + DEPTH * SHARES, start)
            tile = gl.where(more, tile, tile + programs * (TILES * PER))
            from_here = _addresses(planes, scales, tile, unit, lane, units_k, GROUP, PER)
            for slot in gl.static_range(DEPTH):
                x, pair_x, steps_of_x = (), (), ()
                if NUMBERS or not PAIRED:
                    x = _for_lanes(x_view.index(step * DEPTH + slot), 4 * TILES_M, 4, ROWS, SHARES, TILES)
                if DIGITS:
                    scales_here = scale_view.index(step * DEPTH + slot)
                    if PAIRED:
                        pair_x = _for_lanes(pair_view.index(step * DEPTH + slot), 4 * COLUMNS, 4, 4 * ROWS, SHARES, TILES)
                        steps_of_x = _scales_for_lanes(scales_here, COLUMNS, 1, SHARES, TILES)
                    else:
                        steps_of_x = _scales_for_lanes(scales_here, TILES_M, 2, SHARES, TILES)
                for index in gl.static_range(len(WIDTHS)):
                    if len(WIDTHS) == 1:
                        totals, pair_totals = _use_unit(
                            slots[slot], tables[index], x, pair_x, steps_of_x, totals, pair_totals, sum_widths, WIDTHS[index], False,
                            RULE, GROUP, TILES_M, COLUMNS, PAIRED, CODE,
                        )  # fmt: skip
                    else:
                        if has[index]:
                            totals, pair_totals = _use_unit(
                                slots[slot], tables[index], x, pair_x, steps_of_x, totals, pair_totals, sum_widths, WIDTHS[index],
                                True, RULE, GROUP, TILES_M, COLUMNS, PAIRED, CODE,
                            )  # fmt: skip
                if any_more:
                    slots = with_slot(
                        slots,
                        slot,
                        _load_tiles(
                            from_here, planes, scales, tile, unit, slot * SHARES, last, lane, units_k, has, WIDTHS, RULE, GROUP, BITS,
                            PER, EVEN, CODE,
                        ),
                        DEPTH,
                    )  # fmt: skip
        if NUMBERS or not PAIRED:
            total = _tile_of_sums(totals, TILES_M, PER, TILES, SHARES) * factor(RULE)
            _put(
                total, scales, bias, y_ptr, workspace, token_profiles, profile_widths, turn, m, n, n_padded, WIDTHS, RULE, GROUP,
                HAS_BIAS, SPLIT, 8 * TILES_M, TILES * PER, WARPS, PAIRED, False,
            )  # fmt: skip
        if DIGITS and PAIRED:
            total = _tile_of_pairs(pair_totals, COLUMNS, TILES, SHARES) * factor(RULE)
            _put(
                total, scales, bias, y_ptr, workspace, token_profiles, profile_widths, turn, m, n, n_padded, WIDTHS, RULE, GROUP,
                HAS_BIAS, SPLIT, 2 * COLUMNS, TILES * PER, WARPS, True, True,
            )  # fmt: skip


@gluon.jit
def _put(
    total, scales, bias, y_ptr, workspace, token_profiles, profile_widths, turn, m, n, n_padded,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, SOME: gl.constexpr, DIGITS: gl.constexpr,
):  # fmt: skip
    """Write sums [ROWS, 16 * TILES]. SOME: of rows of several widths, only those that take digits, or do not."""
    row, output = _places(_sums_layout(WARPS), turn, ROWS, TILES)
    exists = row < m
    if SOME and len(WIDTHS) > 1:
        width = _widths_of(token_profiles, profile_widths, row, m)
        in_digits = width < 0
        for index in gl.static_range(len(WIDTHS)):
            if takes_digits(WIDTHS[index], RULE):
                in_digits = in_digits | (width == WIDTHS[index])
        exists = exists & (in_digits == DIGITS)
    if SPLIT > 1:
        places = _workspace_places(row, output, n_padded)
        mask = exists[:, None] & (output < n_padded)[None, :]
        gl.store(workspace + gl.program_id(1) * (m.to(gl.int64) * n_padded) + places, total, mask=mask)
    else:
        _finish(total, scales, bias, y_ptr, row, exists, output, n, GROUP, HAS_BIAS)


@gluon.jit
def _addresses(planes, scales, tile, unit, lane, units_k, GROUP: gl.constexpr, PER: gl.constexpr):
    """Per tile of a warp, where a unit's words of each plane are, and its scales."""
    GROUPS: gl.constexpr = 1 if GROUP == -1 else 128 // GROUP
    addresses = ()
    for index in gl.static_range(PER):
        number = (tile + index) * units_k + unit
        pair, single = number * 128 + 4 * lane, number * 64 + 2 * lane
        scale = number * (8 * GROUPS) + lane // 4
        if scales.dtype.element_ty.primitive_bitwidth == 16:
            scale_address = scales.to(gl.pointer_type(gl.int32), bitcast=True) + scale
        else:
            scale_address = scales + 2 * scale
        addresses = addresses + (
            (planes[0] + pair, planes[1] + single, planes[2] + single, planes[3] + pair, planes[4] + pair, scale_address),
        )
    return addresses


@gluon.jit
def _load_tiles(
    addresses, planes, scales, tile, unit, AFTER: gl.constexpr, last, lane, units_k, has,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr, PER: gl.constexpr, EVEN: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """Per tile of a warp, words and scales of the unit that is AFTER units later. EVEN: there is one."""
    tiles = ()
    for index in gl.static_range(PER):
        if EVEN and len(WIDTHS) == 1:
            tiles = tiles + (_load_after(addresses[index], lane, AFTER, GROUP, BITS, CODE),)
        else:
            wanted = unit + AFTER
            tiles = tiles + (
                load_tile(planes, scales, tile + index, wanted, wanted < last, lane, units_k, has, WIDTHS, RULE, GROUP, BITS, CODE),
            )  # fmt: skip
    return tiles


@gluon.jit
def _load_after(addresses, lane, AFTER: gl.constexpr, GROUP: gl.constexpr, BITS: gl.constexpr, CODE: gl.constexpr):
    """As ``gemm.load_tile``; a constant more in an address costs nothing."""
    words = load_four(addresses[0], AFTER * 128, True, CODE)
    if BITS >= 3:
        words = words + load_two(addresses[1], AFTER * 64, CODE)
    if BITS >= 4:
        words = words + load_two(addresses[2], AFTER * 64, CODE)
    if BITS >= 6:
        words = words + load_four(addresses[3], AFTER * 128, True, CODE)
    if BITS >= 8:
        words = words + load_four(addresses[4], AFTER * 128, True, CODE)
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
def _turns(n_padded, TILES: gl.constexpr):
    """How often a program computes TILES tiles."""
    return (n_padded // (16 * TILES) - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _places(LAYOUT: gl.constexpr, turn, ROWS: gl.constexpr, TILES: gl.constexpr):
    """Rows and outputs of the TILES tiles of a turn."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    group = gl.program_id(0) + turn * gl.num_programs(0)
    return row, group * (16 * TILES) + gl.arange(0, 16 * TILES, layout=gl.SliceLayout(0, LAYOUT))


@gluon.jit
def _workspace_places(row, output, n_padded):
    return row[:, None].to(gl.int64) * n_padded + output[None, :]


@triton.constexpr_function
def _sums_layout(warps):
    return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])


@gluon.jit
def _no_sums(TILES_M: gl.constexpr, WARPS: gl.constexpr):
    """Zeros, as lanes hold sums."""
    zero = gl.full((32 * WARPS,), 0.0, gl.float32, _element_layout(WARPS))
    sums = ()
    for _ in gl.static_range(TILES_M):
        sums = sums + ((zero, zero, zero, zero),)
    return sums


@gluon.jit
def _use_unit(
    tiles, table, x, pair_x, steps_of_x, totals, pair_totals, sum_widths,
    WIDTH: gl.constexpr, SEVERAL: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, TILES_M: gl.constexpr,
    COLUMNS: gl.constexpr, PAIRED: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Totals plus the products of a unit, its weights read at WIDTH; only for rows of that width if there are several."""
    PIECES: gl.constexpr = 4 if GROUP == -1 else GROUP // 32
    for group in gl.static_range(4 // PIECES):
        if PAIRED and takes_digits(WIDTH, RULE):
            sums = _pair_sums(tiles, table, pair_x, group * PIECES, PIECES, WIDTH, RULE, COLUMNS, CODE)
            upper, lower = both_scales(tiles[0][1][group])
            next_upper, next_lower = both_scales(tiles[1][1][group])
            scaled = ()
            for column in gl.static_range(COLUMNS):
                step, total, part = steps_of_x[column], pair_totals[column], sums[column]
                result = (
                    gl.fma(part[0] * step, upper, total[0]), gl.fma(part[1] * step, lower, total[1]),
                    gl.fma(part[2] * step, next_upper, total[2]), gl.fma(part[3] * step, next_lower, total[3]),
                )  # fmt: skip
                if SEVERAL:
                    result = _where(sum_widths[1][column] == WIDTH, result, total)
                scaled = scaled + (result,)
            pair_totals = scaled
        else:
            scaled = ()
            for index in gl.static_range(len(tiles)):
                upper, lower = both_scales(tiles[index][1][group])
                if takes_digits(WIDTH, RULE):
                    sums = _digit_sums(tiles[index][0], table, x, group * PIECES, PIECES, WIDTH, RULE, TILES_M, CODE)
                else:
                    sums = _number_sums(tiles[index][0], x, group * PIECES, PIECES, WIDTH, RULE, TILES_M, CODE)
                for rows in gl.static_range(TILES_M):
                    if takes_digits(WIDTH, RULE):
                        even, odd = steps_of_x[2 * rows], steps_of_x[2 * rows + 1]
                        part = (sums[rows][0] * even, sums[rows][1] * odd, sums[rows][2] * even, sums[rows][3] * odd)
                    else:
                        part = sums[rows]
                    widths = ()
                    if SEVERAL:
                        widths = sum_widths[0][rows]
                    total = totals[index * TILES_M + rows]
                    scaled = scaled + (add_scaled(total, part, upper, lower, widths, WIDTH, SEVERAL),)
            totals = scaled
    return totals, pair_totals


@gluon.jit
def _where(condition, first, second):
    return (
        gl.where(condition, first[0], second[0]), gl.where(condition, first[1], second[1]),
        gl.where(condition, first[2], second[2]), gl.where(condition, first[3], second[3]),
    )  # fmt: skip


@gluon.jit
def _pair_sums(
    tiles, table, x, FIRST: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, COLUMNS: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """As ``_digit_sums``, for up to 4 rows, in an order that saves instructions.

    The words of levels are used as they come, outputs g and g + 8 in turns, of two tiles in the rows of a left operand; the
    columns of the right one are (row, digit, output + 8), whose bytes for the other output are 0. So every eight of these, a
    lane's sums are: output g and g + 8 of the first tile, then of the second, all of row and digit j.
    """
    sums = ()
    for _ in gl.static_range(COLUMNS):
        sums = sums + ((),)
    for part in gl.static_range(PIECES):
        one = _bytes(tiles[0][0], table, FIRST + part, WIDTH, RULE, True, CODE)
        other = _bytes(tiles[1][0], table, FIRST + part, WIDTH, RULE, True, CODE)
        result = ()
        for column in gl.static_range(COLUMNS):
            words = _four(x, (FIRST + part) * COLUMNS + column)
            both = _multiply_digits((one[0], other[0], one[1], other[1]), words[0], words[1], sums[column], part == 0, CODE)
            both = _multiply_digits((one[2], other[2], one[3], other[3]), words[2], words[3], both, False, CODE)
            result = result + (both,)
        sums = result
    result = ()
    for column in gl.static_range(COLUMNS):
        numbers = ()
        for index in gl.static_range(4):
            numbers = numbers + (sums[column][index].to(gl.float32, bitcast=True) - _SUM_START,)
        result = result + (numbers,)
    return result


@gluon.jit
def _number_sums(
    words, x, FIRST: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, TILES_M: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """Sums of pieces for every 8 rows, of products of numbers."""
    sums = ()
    for _ in gl.static_range(TILES_M):
        sums = sums + ((),)
    for part in gl.static_range(PIECES):
        pairs = piece_weights(words, FIRST + part, WIDTH, RULE, CODE)
        result = ()
        for rows in gl.static_range(TILES_M):
            result = result + (
                multiply(pairs, _four(x, (FIRST + part) * TILES_M + rows), sums[rows], num_terms(WIDTH, RULE), part == 0, CODE),
            )
        sums = result
    return sums


@gluon.jit
def _four(x, NUMBER: gl.constexpr):
    return (x[4 * NUMBER], x[4 * NUMBER + 1], x[4 * NUMBER + 2], x[4 * NUMBER + 3])


@gluon.jit
def _tables(token_profiles, WIDTHS: gl.constexpr, RULE: gl.constexpr, WARPS: gl.constexpr, CODE: gl.constexpr):
    """Per width, the words of its table, if it has one."""
    # 0, but the compiler, which would copy constants to where they are needed time and again, does not know.
    zero = gl.load(token_profiles + gl.full((32 * WARPS,), 0, gl.int32, _element_layout(WARPS))) >> 31
    tables = ()
    for index in gl.static_range(len(WIDTHS)):
        words = ()
        if takes_digits(WIDTHS[index], RULE):
            for place in gl.static_range(_num_level_words(CODE, WIDTHS[index], RULE)):
                words = words + (zero | _level_word(CODE, WIDTHS[index], RULE, place),)
        tables = tables + (words,)
    return tables


@gluon.jit
def _bytes(
    words, table, PIECE: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, PAIRED: gl.constexpr, CODE: gl.constexpr
):  # fmt: skip
    """Levels of a piece from the words of a unit."""
    given = (words[place_of(PIECE, 0)],)
    if bits_needed(WIDTH, RULE) >= 3:
        given = given + (words[place_of(PIECE, 1)],)
    given = given + table
    assembly: gl.constexpr = _level_bytes(CODE, WIDTH, PIECE % 2, RULE, PAIRED)
    return gl.inline_asm_elementwise(assembly[0], assembly[1], given, (gl.int32,) * 4, True, 1)


@gluon.jit
def _multiply_digits(weights, first, second, sums, FIRST: gl.constexpr, CODE: gl.constexpr):
    given = weights + (first, second)
    if not FIRST:
        given = given + sums
    assembly: gl.constexpr = _digit_product(CODE, FIRST)
    return gl.inline_asm_elementwise(assembly[0], assembly[1], given, (gl.int32,) * 4, True, 1)


@gluon.jit
def _digit_sums(
    words, table, x, FIRST: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, TILES_M: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """As ``_number_sums``, in integers: float32, in steps of the upper digit."""
    sums = ()
    for _ in gl.static_range(TILES_M):
        sums = sums + (((), ()),)
    for part in gl.static_range(PIECES):
        weights = _bytes(words, table, FIRST + part, WIDTH, RULE, False, CODE)
        result = ()
        for rows in gl.static_range(TILES_M):
            digits = _four(x, (FIRST + part) * TILES_M + rows)
            upper = _multiply_digits(weights, digits[0], digits[1], sums[rows][0], part == 0, CODE)
            lower = _multiply_digits(weights, digits[2], digits[3], sums[rows][1], part == 0, CODE)
            result = result + ((upper, lower),)
        sums = result
    result = ()
    for rows in gl.static_range(TILES_M):
        numbers = ()
        for index in gl.static_range(4):
            upper = sums[rows][0][index].to(gl.float32, bitcast=True) - _LOWER_START
            numbers = numbers + (gl.fma(sums[rows][1][index].to(gl.float32, bitcast=True), 1.0 / 256.0, upper),)
        result = result + (numbers,)
    return result


@gluon.jit
def _tile_of_sums(totals, TILES_M: gl.constexpr, PER: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr):
    """Sums as lanes hold them, those of warps that share a tile added up -> [8 * TILES_M, 16 * TILES * PER]."""
    tiles = ()
    for index in gl.static_range(PER * TILES_M):
        sums = totals[index]
        upper, lower = gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3])
        # share, tile, g, j, odd row, output + 8
        lanes = gl.reshape(gl.join(upper, lower), (SHARES, TILES, 8, 4, 2, 2))
        tiles = tiles + (gl.permute(lanes, (0, 3, 4, 1, 5, 2)),)
    rows = ()
    for index in gl.static_range(PER):
        if TILES_M == 1:
            rows = rows + (gl.reshape(tiles[index], (SHARES, 8, TILES, 16)),)
        else:
            both = gl.permute(gl.join(tiles[2 * index], tiles[2 * index + 1]), (0, 6, 1, 2, 3, 4, 5))
            rows = rows + (gl.reshape(both, (SHARES, 16, TILES, 16)),)
    if PER == 1:
        result = rows[0]
    else:
        result = gl.permute(gl.join(rows[0], rows[1]), (0, 1, 2, 4, 3))
    result = gl.reshape(result, (SHARES, 8 * TILES_M, 16 * TILES * PER))
    return gl.convert_layout(gl.sum(result, axis=0), _sums_layout(SHARES * TILES))


@gluon.jit
def _tile_of_pairs(totals, COLUMNS: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr):
    """As ``_tile_of_sums`` for the sums of ``_pair_sums``, those of the digits added up: [2 * COLUMNS, 32 * TILES]."""
    rows = ()
    for column in gl.static_range(COLUMNS):
        sums = totals[column]
        both = gl.join(gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3]))
        # share, tile, g, row, digit, output + 8, second tile -> share, row, tile, second, output
        lanes = gl.sum(gl.reshape(both, (SHARES, TILES, 8, 2, 2, 2, 2)), axis=4)
        rows = rows + (gl.reshape(gl.permute(lanes, (0, 3, 1, 5, 4, 2)), (SHARES, 2, 32 * TILES)),)
    if COLUMNS == 1:
        result = rows[0]
    else:
        result = gl.reshape(gl.permute(gl.join(rows[0], rows[1]), (0, 3, 1, 2)), (SHARES, 4, 32 * TILES))
    return gl.convert_layout(gl.sum(result, axis=0), _sums_layout(SHARES * TILES))


@gluon.jit
def _widths_of(token_profiles, profile_widths, rows, m):
    """Widths of rows; 0 of those that do not exist."""
    profiles = gl.load(token_profiles + rows, mask=rows < m, other=0)
    return gl.load(profile_widths + profiles, mask=rows < m, other=0)


@gluon.jit
def _present(widths, WIDTHS: gl.constexpr):
    """Which of WIDTHS are among those of the rows."""
    has = ()
    for index in gl.static_range(len(WIDTHS)):
        has = has + (gl.max((widths == WIDTHS[index]).to(gl.int32), axis=0) > 0,)
    return has


@gluon.jit
def _widths_of_sums(token_profiles, profile_widths, m, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Widths of the two rows of which a lane has sums, for every 8; and of the one of ``_pair_sums``, for every 2."""
    j = gl.arange(0, 32 * WARPS, layout=_element_layout(WARPS)) % 4
    several, pairs = (), ()
    for tile in gl.static_range((ROWS + 7) // 8):
        even = _widths_of(token_profiles, profile_widths, 2 * j + 8 * tile, m)
        several = several + ((even, _widths_of(token_profiles, profile_widths, 2 * j + 8 * tile + 1, m)),)
    for column in gl.static_range(max(ROWS // 2, 1)):
        pairs = pairs + (_widths_of(token_profiles, profile_widths, j // 2 + 2 * column, m),)
    return (several, pairs)


@gluon.jit(do_not_specialize=["m", "units_k"])
def _small_kernel(
    x_ptr, plane0, plane1, plane2, plane3, plane4, scales, bias, y_ptr, workspace, locks, token_profiles, profile_widths,
    m, n, n_padded, k, units_k, stride_x,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    ROWS: gl.constexpr, PER: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr, SHARE: gl.constexpr, EVEN: gl.constexpr,
    DEPTHS: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Grid: (programs of tiles, SPLIT). SHARE: the most units that a program has; EVEN: all have as many, a
    multiple of SHARES times any of DEPTHS, which are per width."""
    WARPS: gl.constexpr = TILES * SHARES
    TILES_M: gl.constexpr = (ROWS + 7) // 8
    UNITS: gl.constexpr = _units_at_once(SHARE, ROWS, WARPS)
    ROOM: gl.constexpr = _room(SHARE, UNITS, SHARES)
    if PDL:
        # The kernel may have been started before the one before it ended. What is read until the wait must be older than that
        # one: weights always are, and the step's row data are written ahead of all layers.
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", (), gl.int32, False, 1)
    planes = (plane0, plane1, plane2, plane3, plane4)
    first, last = gl.program_id(1) * units_k // SPLIT, (gl.program_id(1) + 1) * units_k // SPLIT
    xs = gl.allocate_shared_memory(gl.int32, [ROOM, ROWS * 64], _flat(1))
    x_scales = gl.allocate_shared_memory(gl.float32, [ROOM, _num_scales(ROWS)], _flat(1))
    pair_xs = xs
    if _paired(ROWS, PER) and takes_digits(WIDTHS[0], RULE):
        pair_xs = gl.allocate_shared_memory(gl.int32, [ROOM, ROWS * 256], _flat(1))
    if len(WIDTHS) == 1:
        _compute(
            x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, (), (), xs, pair_xs, x_scales, first,
            last, units_k, m, n, n_padded, k, stride_x, WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, ROWS, PER, TILES, SHARES, DEPTHS[0], ROOM,
            UNITS, EVEN, PDL, CODE,
        )  # fmt: skip
    else:
        rows = gl.arange(0, ROWS, layout=_element_layout(WARPS))
        widths = _widths_of(token_profiles, profile_widths, rows, m)
        widest = gl.max(widths, axis=0)
        # Rows of one width have a loop of their own, which is half as long as that for rows of several.
        only = gl.where(gl.min(gl.where(rows < m, widths, widest), axis=0) == widest, widest, 0)
        if only == 0:
            _compute(
                x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, _present(widths, WIDTHS),
                _widths_of_sums(token_profiles, profile_widths, m, ROWS, WARPS), xs, pair_xs, x_scales, first, last, units_k, m, n,
                n_padded, k, stride_x, WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, ROWS, PER, TILES, SHARES, 1, ROOM, UNITS, EVEN, PDL, CODE,
            )  # fmt: skip
        for index in gl.static_range(len(WIDTHS)):
            if only == WIDTHS[index]:
                _compute(
                    x_ptr, planes, scales, bias, y_ptr, workspace, token_profiles, profile_widths, (), (), xs, pair_xs, x_scales,
                    first, last, units_k, m, n, n_padded, k, stride_x, _alone(WIDTHS[index]), RULE, GROUP, HAS_BIAS, SPLIT, ROWS, PER,
                    TILES, SHARES, DEPTHS[index], ROOM, UNITS, EVEN, PDL, CODE,
                )  # fmt: skip
    if SPLIT > 1:
        # Every program has left its sums; the last one to arrive adds them, always in the order of K.
        _barrier()
        lock = locks + gl.program_id(0)
        arrived = gl.atomic_add(lock, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            for turn in range(_turns(n_padded, TILES * PER)):
                row, output = _places(_sums_layout(WARPS), turn, 8 * TILES_M, TILES * PER)
                places = _workspace_places(row, output, n_padded)
                mask = (row < m)[:, None] & (output < n_padded)[None, :]
                total = gl.full((8 * TILES_M, 16 * TILES * PER), 0.0, gl.float32, _sums_layout(WARPS))
                for other in gl.static_range(SPLIT):
                    part = workspace + other * (m.to(gl.int64) * n_padded) + places
                    total += gl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
                _finish(total, scales, bias, y_ptr, row, row < m, output, n, GROUP, HAS_BIAS)
            gl.store(lock, 0)


@gluon.jit
def _finish(total, scales, bias, y_ptr, row, row_mask, output, n, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr):
    exists = output < n
    if GROUP == -1:
        place = output // 16 * 16 + output % 8 * 2 + output % 16 // 8
        total *= gl.load(scales + place, mask=exists, other=0.0).to(gl.float32)[None, :]
    if HAS_BIAS:
        total += gl.load(bias + output, mask=exists, other=0.0).to(gl.float32)[None, :]
    places = row[:, None].to(gl.int64) * n + output[None, :]
    gl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & exists[None, :])


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
    groups = n_padded // (UNIT_N * config.tiles * config.per_warp)
    depths = config.depths_of(widths)
    even = units_k % (split * config.shares * lcm(*depths)) == 0
    grid = (min(groups, config.programs or groups), split)
    _small_kernel[grid](
        x, *given, scales, y if bias is None else bias, y, workspace, locks, token_profiles, profile_widths,
        m, n, n_padded, k, units_k, x.stride(0),
        WIDTHS=tuple(widths), RULE=rule, GROUP=group_size, HAS_BIAS=bias is not None, SPLIT=split, ROWS=config.rows,
        PER=config.per_warp, TILES=config.tiles, SHARES=config.shares, SHARE=-(-units_k // split), EVEN=even, DEPTHS=depths, PDL=config.pdl,
        CODE=SmallCode("bf16" if x.dtype == torch.bfloat16 else "f16"), num_warps=config.num_warps,
        maxnreg=config.max_registers, launch_pdl=config.pdl,
    )  # fmt: skip
    return y
