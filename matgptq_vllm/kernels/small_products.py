"""Products of a unit in kernels.small: words of the planes and x, as lanes hold them, to sums.

Weights are the left operand: a lane 4g + j has weights of outputs g and g + 8 of a tile, and sums of these for rows 2j and
2j + 1 of every 8: (g, 2j), (g, 2j + 1), (g + 8, 2j), (g + 8, 2j + 1).
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels.digits_ptx import SUM_START
from matgptq_vllm.kernels.gemm import add_scaled
from matgptq_vllm.kernels.lanes import (
    bits_needed,
    both_scales,
    multiply,
    num_terms,
    piece_weights,
    place_of,
    scales_of_weights,
)
from matgptq_vllm.kernels.small_x import element_layout, takes_digits

_SUM_START = gl.constexpr(SUM_START)
_LOWER_START = gl.constexpr(SUM_START * (1.0 + 1.0 / 256.0))


@triton.constexpr_function
def _level_bytes(code, width, half, rule, paired):
    return code.level_bytes(width, half, rule, paired)


@triton.constexpr_function
def _levels_by_sign(code, half):
    return code.levels_by_sign(half)


@triton.constexpr_function
def _num_level_words(code, width, rule):
    return len(code.level_words(width, rule))


@triton.constexpr_function
def _level_word(code, width, rule, place):
    return code.level_words(width, rule)[place]


@triton.constexpr_function
def _digit_product(code, first, upper):
    return code.digit_product(first, upper)


@gluon.jit
def tables(
    token_profiles, WIDTHS: gl.constexpr, RULE: gl.constexpr, SINGLE: gl.constexpr, WARPS: gl.constexpr, CODE: gl.constexpr
):  # fmt: skip
    """Per width, the words of its table of levels, if it has one."""
    # 0, but the compiler, which would copy constants to where they are needed time and again, does not know.
    zero = gl.load(token_profiles + gl.full((32 * WARPS,), 0, gl.int32, element_layout(WARPS))) >> 31
    result = ()
    for index in gl.static_range(len(WIDTHS)):
        words = ()
        if takes_digits(WIDTHS[index], RULE, SINGLE):
            for place in gl.static_range(_num_level_words(CODE, WIDTHS[index], RULE)):
                words = words + (zero | _level_word(CODE, WIDTHS[index], RULE, place),)
        result = result + (words,)
    return result


@gluon.jit
def use_unit(
    tile, table, x, x_scales, totals, widths,
    WIDTH: gl.constexpr, SEVERAL: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, TILES_M: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """Totals plus the products of a unit, its weights read at WIDTH; only for rows of that width if there are several.

    Args:
        tile: of ``gemm.load_tile``.
        x, x_scales: of ``small_x``.
        totals: four float32 for every 8 rows.
        widths: with SEVERAL, of the two rows of a lane for every 8.
    """
    PIECES: gl.constexpr = 4 if GROUP == -1 else GROUP // 32
    for group in gl.static_range(4 // PIECES):
        if takes_digits(WIDTH, RULE, False):
            upper, lower = both_scales(tile[1][group])
            sums = _digit_sums(tile[0], table, x, x_scales, group * PIECES, PIECES, WIDTH, RULE, TILES_M, CODE)
        else:
            upper, lower = scales_of_weights(tile[1][group], WIDTH, RULE, CODE)
            sums = _number_sums(tile[0], x, group * PIECES, PIECES, WIDTH, RULE, TILES_M, CODE)
        scaled = ()
        for rows in gl.static_range(TILES_M):
            own = ()
            if SEVERAL:
                own = widths[rows]
            scaled = scaled + (add_scaled(totals[rows], sums[rows], upper, lower, own, WIDTH, SEVERAL),)
        totals = scaled
    return totals


@gluon.jit
def use_unit_for_columns(
    tile, table, x, x_scales, totals,
    WIDTH: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """As ``use_unit`` for up to 4 rows in digits: both digits take part in one product, whose columns are (digit, row).

    Args:
        x_scales: of the two rows of which the lane has sums.
        totals: four float32: (g, row), (g, next row), (g + 8, row), (g + 8, next row) of digit j / 2 and the rows from
            2 * (j mod 2) on.
    """
    PIECES: gl.constexpr = 4 if GROUP == -1 else GROUP // 32
    for group in gl.static_range(4 // PIECES):
        sums = ()
        for part in gl.static_range(PIECES):
            levels = _bytes(tile[0], table, group * PIECES + part, WIDTH, RULE, False, CODE)
            first, second = x[2 * (group * PIECES + part)], x[2 * (group * PIECES + part) + 1]
            sums = _multiply_digits(levels, first, second, sums, part == 0, CODE)
        upper, lower = both_scales(tile[1][group])
        numbers = ()
        for index in gl.static_range(4):
            numbers = numbers + ((sums[index].to(gl.float32, bitcast=True) - _SUM_START) * x_scales[index % 2],)
        totals = add_scaled(totals, numbers, upper, lower, (), WIDTH, False)
    return totals


@gluon.jit
def use_unit_for_pairs(
    tile, table, x, x_scales, totals,
    WIDTH: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """As ``use_unit`` for a single row in digits, which saves instructions: levels are used in the order in which they come.

    A word of levels has outputs g and g + 8 in turns. The columns of the right operand are (digit, output + 8), whose bytes
    for the other output are 0. The lower half of the left operand's rows has what is subtracted, at 4 bits, or is 0.

    Args:
        totals: two float32, of outputs g and g + 8, for digit j.
    """
    PIECES: gl.constexpr = 4 if GROUP == -1 else GROUP // 32
    BY_SIGN: gl.constexpr = bits_needed(WIDTH, RULE) == 4
    for group in gl.static_range(4 // PIECES):
        sums = ()
        for part in gl.static_range(PIECES):
            words = _four(x, group * PIECES + part)
            if BY_SIGN:
                levels = _bytes_by_sign(tile[0], table, group * PIECES + part, CODE)
                left, right = _four(levels, 0), _four(levels, 1)
            else:
                levels = _bytes(tile[0], table, group * PIECES + part, WIDTH, RULE, True, CODE)
                left, right = (levels[0], levels[1]), (levels[2], levels[3])
            sums = _multiply_digits(left, words[0], words[1], sums, part == 0, CODE)
            sums = _multiply_digits(right, words[2], words[3], sums, False, CODE)
        upper, lower = both_scales(tile[1][group])
        first, second = sums[0].to(gl.float32, bitcast=True), sums[1].to(gl.float32, bitcast=True)
        if BY_SIGN:
            first -= sums[2].to(gl.float32, bitcast=True)
            second -= sums[3].to(gl.float32, bitcast=True)
        else:
            first -= _SUM_START
            second -= _SUM_START
        totals = (gl.fma(first * x_scales[0], upper, totals[0]), gl.fma(second * x_scales[0], lower, totals[1]))
    return totals


@gluon.jit
def _number_sums(
    words, x, FIRST: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, TILES_M: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """Sums over pieces for every 8 rows, of products of numbers."""
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
def _digit_sums(
    words, table, x, x_scales, FIRST: gl.constexpr, PIECES: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr,
    TILES_M: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """As ``_number_sums``, of products of bytes."""
    sums = ()
    for _ in gl.static_range(TILES_M):
        sums = sums + (((), ()),)
    for part in gl.static_range(PIECES):
        levels = _bytes(words, table, FIRST + part, WIDTH, RULE, False, CODE)
        result = ()
        for rows in gl.static_range(TILES_M):
            digits = _four(x, (FIRST + part) * TILES_M + rows)
            upper = _multiply_digits(levels, digits[0], digits[1], sums[rows][0], part == 0, CODE)
            lower = _multiply_digits(levels, digits[2], digits[3], sums[rows][1], part == 0, CODE)
            result = result + ((upper, lower),)
        sums = result
    result = ()
    for rows in gl.static_range(TILES_M):
        numbers = ()
        for index in gl.static_range(4):
            upper = sums[rows][0][index].to(gl.float32, bitcast=True) - _LOWER_START
            both = gl.fma(sums[rows][1][index].to(gl.float32, bitcast=True), 1.0 / 256.0, upper)
            numbers = numbers + (both * x_scales[2 * rows + index % 2],)
        result = result + (numbers,)
    return result


@gluon.jit
def _four(x, NUMBER: gl.constexpr):
    return (x[4 * NUMBER], x[4 * NUMBER + 1], x[4 * NUMBER + 2], x[4 * NUMBER + 3])


@gluon.jit
def _bytes(
    words, table, PIECE: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, PAIRED: gl.constexpr, CODE: gl.constexpr
):  # fmt: skip
    """Levels of a piece from the words of a unit, see ``digits_ptx.level_bytes``."""
    given = (words[place_of(PIECE, 0)],)
    if bits_needed(WIDTH, RULE) >= 3:
        given = given + (words[place_of(PIECE, 1)],)
    given = given + table
    assembly: gl.constexpr = _level_bytes(CODE, WIDTH, PIECE % 2, RULE, PAIRED)
    return gl.inline_asm_elementwise(assembly[0], assembly[1], given, (gl.int32,) * 4, True, 1)


@gluon.jit
def _bytes_by_sign(words, table, PIECE: gl.constexpr, CODE: gl.constexpr):
    """As ``_bytes`` for 4 bits, see ``digits_ptx.levels_by_sign``."""
    given = (words[place_of(PIECE, 0)], words[place_of(PIECE, 1)], words[place_of(PIECE, 2)]) + table
    assembly: gl.constexpr = _levels_by_sign(CODE, PIECE % 2)
    return gl.inline_asm_elementwise(assembly[0], assembly[1], given, (gl.int32,) * 8, True, 1)


@gluon.jit
def _multiply_digits(levels, first, second, sums, FIRST: gl.constexpr, CODE: gl.constexpr):
    given = levels + (first, second)
    if not FIRST:
        given = given + sums
    assembly: gl.constexpr = _digit_product(CODE, FIRST, len(levels) == 2)
    return gl.inline_asm_elementwise(assembly[0], assembly[1], given, (gl.int32,) * 4, True, 1)
