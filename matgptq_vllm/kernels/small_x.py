"""x in shared memory, as the lanes of kernels.small need it: made ready once per program, for all its tiles.

    words     int32 [unit, piece, row, j, 4]    8 numbers, word j of each 8 columns of a piece: two per word, or, of rows whose
                                                width ``takes_digits``, the upper digits of four in each of two words, then the
                                                lower
    pairs     int32 [unit, piece, 4, j, 4]      of a single row in digits, see ``small_products.use_unit_for_pairs``: per
                                                (digit, output + 8), the first four numbers, the even ones and the odd, then the
                                                other four likewise
    scales    float32 [unit, 8 or 16 rows]      what a step of the upper digit is worth; with pairs [unit, 4]: of either digit

Rows above the last hold anything: every sum is of one row.
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from matgptq_vllm.kernels import digits_ptx
from matgptq_vllm.kernels.digits_ptx import DIGIT_STEPS
from matgptq_vllm.kernels.gluon_names import copy_async

# Triton 3.6 has other names than later releases.
_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

_STEPS = gl.constexpr(float(DIGIT_STEPS))
_TINY = gl.constexpr(0x0DA24260)  # 1e-30: numbers no greater than it count as zero

takes_digits = triton.constexpr_function(digits_ptx.takes_digits)


@triton.constexpr_function
def _digit_words(code):
    return code.digit_words()


@triton.constexpr_function
def _unit_scale(code, width, rule):
    return code.unit_scale(width, rule)


@triton.constexpr_function
def flat(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(reversed(range(rank))))


@gluon.jit
def view_as(shared, DTYPE: gl.constexpr, SHAPE: gl.constexpr):
    """Shared memory as a tensor of a type and shape, row by row."""
    if _REINTERPRET:
        result = shared.reinterpret(DTYPE, SHAPE, flat(len(SHAPE) - 1))
    else:
        result = shared._reinterpret(DTYPE, SHAPE, flat(len(SHAPE) - 1))
    return result


@triton.constexpr_function
def num_scales(rows):
    """Scales of a unit."""
    return 4 if rows == 1 else max(rows, 8)


@triton.constexpr_function
def element_layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0])


@triton.constexpr_function
def units_at_once(share, rows, warps):
    """Units of K of which x is made ready at once: up to 32 numbers per thread."""
    units = max(2 * warps // rows, 1)
    while units < share and units * 2 * rows <= 8 * warps:
        units *= 2
    return units


@triton.constexpr_function
def room(share, at_once, step):
    """Units in shared memory: whole steps of all loops, and whole parts made ready at once."""
    multiple = max(at_once, step)
    return -(-share // multiple) * multiple


@triton.constexpr_function
def _parts_layout(units, rows, warps):
    """[units, 4, rows, 4, 4]: a thread has four adjacent words; half a warp a row's part of a unit, one row after the other."""

    def basis(axis, value):
        return [value if place == axis else 0 for place in range(5)]

    of_row = rows.bit_length() - 1
    parts = [
        basis(2, 1 << bit) if bit < of_row else basis(0, 1 << (bit - of_row)) for bit in range((units * rows).bit_length() - 1)
    ]
    lanes = [basis(3, 1), basis(3, 2), basis(1, 1), basis(1, 2), parts[0]]
    own = warps.bit_length() - 1
    registers = [basis(4, 1), basis(4, 2)] + parts[1 + own :]
    return gl.DistributedLinearLayout(registers, lanes, parts[1 : 1 + own], [], [units, 4, rows, 4, 4])


@triton.constexpr_function
def _words_layout(units, rows, warps):
    """[units, 4, rows, 4, 4]: a word per thread at a time; a warp has adjacent ones of x, of two rows or of two pieces."""

    def bases(axis, first, end):
        return [[1 << bit if place == axis else 0 for place in range(5)] for bit in range(first, end)]

    several = min(rows.bit_length() - 1, 1)
    lanes = bases(3, 0, 2) + bases(4, 0, 2) + (bases(2, 0, 1) if several else bases(1, 0, 1))
    others = bases(2, several, rows.bit_length() - 1) + bases(1, 1 - several, 2) + bases(0, 0, units.bit_length() - 1)
    own = warps.bit_length() - 1
    return gl.DistributedLinearLayout(others[own:], lanes, others[:own], [], [units, 4, rows, 4, 4])


@gluon.jit
def copy_x(
    xs, x_ptr, m, first, last, k, stride_x,
    ROWS: gl.constexpr, WARPS: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """Copy x of units first to last into shared memory, words in the order of lanes; what is beyond becomes 0."""
    # Few at a time: addresses take registers, which words of weights that are on their way have.
    UNITS: gl.constexpr = max(2 * WARPS // ROWS, 1)
    L: gl.constexpr = _words_layout(UNITS, ROWS, WARPS)
    u = gl.arange(0, UNITS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    piece = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, L)))))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))))
    u, piece, row = u[:, None, None, None, None], piece[None, :, None, None, None], row[None, None, :, None, None]
    j, word = j[None, None, None, :, None], word[None, None, None, None, :]
    view = view_as(xs, gl.int32, (ROOM // UNITS, UNITS, 4, ROWS, 4, 4))
    start = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    # As if it depended on m: the compiler would unroll the loop, to have all addresses at once.
    for number in range(gl.where(m > 0, ROOM // UNITS, 0)):
        unit = first + number * UNITS + u
        column = unit * 64 + piece * 16 + word * 4 + j
        place = row * (stride_x // 2) + column
        copy_async(view.index(number), start + place, mask=(row < m) & (unit < last) & (column < k // 2))
    async_copy.commit_group()


@gluon.jit
def make_digits(
    xs, pairs, x_scales, token_profiles, profile_widths, m,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, DTYPE: gl.constexpr, ROWS: gl.constexpr,
    WARPS: gl.constexpr, ROOM: gl.constexpr, UNITS: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Turn rows whose width takes digits into digits, where they are; a single row into pairs."""
    L: gl.constexpr = _parts_layout(UNITS, ROWS, WARPS)
    view = view_as(xs, gl.int32, (ROOM // UNITS, UNITS, 4, ROWS, 4, 4))
    scale_view = view_as(x_scales, gl.float32, (ROOM // UNITS, UNITS, num_scales(ROWS)))
    for number in range(ROOM // UNITS):
        found = view.index(number).load(L)
        words = gl.reshape(gl.permute(found, (0, 2, 1, 3, 4)), (UNITS * ROWS, 64))
        # As integers, NaN is the greatest, so that it is not lost.
        greatest = gl.reduce(words & 0x7FFF7FFF, 1, _greater_pair)
        greatest = _number(gl.maximum(greatest >> 16, greatest & 0xFFFF), DTYPE)
        inverse = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", (greatest,), gl.float32, True, 1)
        assembly: gl.constexpr = _digit_words(CODE)
        steps, _ = gl.broadcast(gl.expand_dims(inverse * _STEPS, 1), words)
        digits = gl.inline_asm_elementwise(assembly[0], assembly[1], (words, steps), gl.int32, True, 4)
        if ROWS == 1:
            pair_view = view_as(pairs, gl.int32, (ROOM // UNITS, UNITS, 4, 4, 4, 4))
            pair_view.index(number).store(_apart(digits, UNITS))
            scale = greatest * _unit_scale(CODE, WIDTHS[0], RULE)
            scale_view.index(number).slice(0, 2, dim=1).store(gl.reshape(gl.join(scale, scale * (1.0 / 256.0)), (UNITS, 2)))
        else:
            digits = gl.permute(gl.reshape(digits, (UNITS, ROWS, 4, 4, 4)), (0, 2, 1, 3, 4))
            digits = gl.convert_layout(digits, L, assert_trivial=True)
            scale = gl.reshape(greatest, (UNITS, ROWS))
            if len(WIDTHS) == 1:
                scale *= _unit_scale(CODE, WIDTHS[0], RULE)
            else:
                row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
                width = widths_of(token_profiles, profile_widths, row, m)
                in_digits = width < 0
                for index in gl.static_range(len(WIDTHS)):
                    if takes_digits(WIDTHS[index], RULE, False):
                        in_digits = in_digits | (width == WIDTHS[index])
                digits = gl.where(in_digits[None, None, :, None, None], digits, found)
                row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, scale.type.layout))
                width = widths_of(token_profiles, profile_widths, row, m)[None, :]
                for index in gl.static_range(len(WIDTHS)):
                    if takes_digits(WIDTHS[index], RULE, False):
                        scale = gl.where(width == WIDTHS[index], scale * _unit_scale(CODE, WIDTHS[index], RULE), scale)
            view.index(number).store(digits)
            scale_view.index(number).slice(0, ROWS, dim=1).store(scale)


@gluon.jit
def widths_of(token_profiles, profile_widths, rows, m):
    """Widths of rows; 0 of those that do not exist."""
    profiles = gl.load(token_profiles + rows, mask=rows < m, other=0)
    return gl.load(profile_widths + profiles, mask=rows < m, other=0)


@gluon.jit
def _greater_pair(first, second):
    """The greater of each half of two words."""
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", (first, second), gl.int32, True, 1)


@gluon.jit
def _number(bits, DTYPE: gl.constexpr):
    """What the low 16 bits are in a type, float32, at least a number that is too small to matter."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        wide = bits << 16
    else:
        wide = bits.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32).to(gl.int32, bitcast=True)
    return gl.maximum(wide, _TINY).to(gl.float32, bitcast=True)


@gluon.jit
def _apart(digits, UNITS: gl.constexpr):
    """Words of digits [UNITS, 64] -> pairs [UNITS, 4, 4, 4, 4]."""
    digits = gl.reshape(digits, (UNITS, 4, 4, 2, 2))
    first = gl.join(digits & 0x00FF00FF, (digits >> 8) & 0x00FF00FF)
    second = gl.join((digits << 8) & -0x00FF0100, digits & -0x00FF0100)
    # unit, piece, j, digit, half, odd, output + 8
    words = gl.permute(gl.join(first, second), (0, 1, 3, 6, 2, 4, 5))
    return gl.reshape(words, (UNITS, 4, 4, 4, 4))


@triton.constexpr_function
def _layout_by_axes(shape, registers, lanes):
    """Axes 0 and 1 over warps, the second of them first; of the others, those named, the fastest first."""

    def bases(axes):
        return [
            [1 << bit if place == axis else 0 for place in range(len(shape))]
            for axis in axes
            for bit in range(shape[axis].bit_length() - 1)
        ]

    return gl.DistributedLinearLayout(bases(registers), bases(lanes), bases((1, 0)), [], shape)


@triton.constexpr_function
def _lanes_layout(shares, tiles, rows, before, last):
    """[shares, tiles, before, 8 / rows, rows, 4, last]: per lane 4g + j one element of ``before`` and ``last``."""
    return _layout_by_axes([shares, tiles, before, 8 // rows, rows, 4, last], (6, 2), (5, 4, 3))


@gluon.jit
def words_for_lanes(
    shared, BEFORE: gl.constexpr, ROWS: gl.constexpr, SHARES: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    """Shared memory [SHARES, BEFORE, ROWS, 4, 4], at most 8 ROWS -> 4 * BEFORE tensors, a word of row g per thread.

    Lanes of other rows read the same again: row g modulo ROWS.
    """
    LAYOUT: gl.constexpr = _lanes_layout(SHARES, TILES, ROWS, BEFORE, 4)
    found = shared.load(gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    found = gl.expand_dims(gl.expand_dims(found, 1), 3)
    zeros = gl.full((SHARES, TILES, BEFORE, 8 // ROWS, ROWS, 4, 4), 0, gl.int32, LAYOUT)
    found, _ = gl.broadcast(found, zeros)
    return _split(gl.permute(found, (0, 1, 3, 4, 5, 2, 6)), 32 * SHARES * TILES, 4 * BEFORE, element_layout(SHARES * TILES))


@gluon.jit
def scales_for_lanes(shared, BEFORE: gl.constexpr, LAST: gl.constexpr, SHARES: gl.constexpr, TILES: gl.constexpr):
    """Shared memory [SHARES, BEFORE, 4, LAST] -> BEFORE * LAST tensors, that of j per thread."""
    LAYOUT: gl.constexpr = _lanes_layout(SHARES, TILES, 8, BEFORE, LAST)
    found = shared.load(gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LAYOUT))))
    found = gl.expand_dims(gl.expand_dims(gl.expand_dims(found, 1), 3), 4)
    zeros = gl.full((SHARES, TILES, BEFORE, 1, 8, 4, LAST), 0.0, gl.float32, LAYOUT)
    found, _ = gl.broadcast(found, zeros)
    return _split(gl.permute(found, (0, 1, 3, 4, 5, 2, 6)), 32 * SHARES * TILES, BEFORE * LAST, element_layout(SHARES * TILES))


@triton.constexpr_function
def _columns_layout(shares, tiles, before):
    """[shares, tiles, before, row 4, j 4, digit 2, half 2]: lane 4 * (digit, row) + j has both halves."""
    return _layout_by_axes([shares, tiles, before, 4, 4, 2, 2], (6, 2), (4, 3, 5))


@gluon.jit
def words_for_columns(shared, BEFORE: gl.constexpr, SHARES: gl.constexpr, TILES: gl.constexpr):
    """Shared memory [SHARES, BEFORE, row 4, 4, digit 2, 2] -> 2 * BEFORE tensors, words of a lane's column (digit, row)."""
    LAYOUT: gl.constexpr = _columns_layout(SHARES, TILES, BEFORE)
    found = gl.expand_dims(shared.load(gl.SliceLayout(1, LAYOUT)), 1)
    zeros = gl.full((SHARES, TILES, BEFORE, 4, 4, 2, 2), 0, gl.int32, LAYOUT)
    found, _ = gl.broadcast(found, zeros)
    return _split(gl.permute(found, (0, 1, 5, 3, 4, 2, 6)), 32 * SHARES * TILES, 2 * BEFORE, element_layout(SHARES * TILES))


@triton.constexpr_function
def _sums_of_columns(shares, tiles):
    """[shares, tiles, g 8, digit 2, rows 2, odd 2]: lanes as they have sums of two columns (digit, row)."""
    return _layout_by_axes([shares, tiles, 8, 2, 2, 2], (5,), (4, 3, 2))


@gluon.jit
def scales_for_columns(shared, SHARES: gl.constexpr, TILES: gl.constexpr):
    """Shared memory [SHARES, rows 2, odd 2] -> two tensors, of the rows of which a lane has sums."""
    LAYOUT: gl.constexpr = _sums_of_columns(SHARES, TILES)
    found = shared.load(gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    found = gl.expand_dims(gl.expand_dims(gl.expand_dims(found, 1), 2), 3)
    zeros = gl.full((SHARES, TILES, 8, 2, 2, 2), 0.0, gl.float32, LAYOUT)
    found, _ = gl.broadcast(found, zeros)
    return _split(found, 32 * SHARES * TILES, 2, element_layout(SHARES * TILES))


@gluon.jit
def _split(given, THREADS: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """A tensor of which a thread has COUNT elements, the last axes, as COUNT tensors [THREADS]."""
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
def _halves(given, THREADS: gl.constexpr, HALF: gl.constexpr):
    """[THREADS, 2 * HALF] -> two [THREADS, HALF]."""
    return gl.split(gl.permute(gl.reshape(given, (THREADS, 2, HALF)), (0, 2, 1)))
