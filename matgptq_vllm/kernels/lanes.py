"""Triton functions from words of the kernel layout to tiles of weights: through PTX on NVIDIA GPUs, in plain Triton elsewhere.

Both forms give ``core.slicing`` levels divided by ``factor``; the plain form computes levels in float32 and rounds once.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from matgptq_vllm.core.slicing import BEND_LINEAR, BEND_SQUARE, ZERO_LEVEL

_ZERO = tl.constexpr(float(ZERO_LEVEL))
_LINEAR = tl.constexpr(BEND_LINEAR)
_SQUARE = tl.constexpr(BEND_SQUARE)


@triton.constexpr_function
def bits_needed(width, rule):
    """Bits of whole planes that decide the value at a width. Twin of ``lanes_ptx.bits_needed``: no plain function is
    allowed here."""
    bits = min(width + 1, 8) if rule == "round" else width
    return min([held for held in (2, 3, 4, 6, 8) if held >= bits])


@triton.constexpr_function
def factor(width, rule, code):
    """What tiles of weights are to be multiplied with."""
    return 1.0 if code is None else code.factor(width, rule)


@triton.constexpr_function
def _text(code, width, half, rule):
    return code.weights(width, half, rule).text


@triton.constexpr_function
def _constraints(code, width, half, rule):
    return code.weights(width, half, rule).constraints


@triton.jit
def load_words(plane, half_block, first_row, n_padded, TWO_BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Words of a plane for BLOCK_N rows of a half block, or of the block that it lies in if the plane has one bit: int32
    [BLOCK_N * 8] of the lower eight rows of every strip of 16, and as many of the upper."""
    if not TWO_BITS:
        half_block = half_block // 2
    source = plane + (half_block * n_padded * 16 + first_row * 8) + tl.arange(0, BLOCK_N * 8)
    return (tl.load(source), tl.load(source + n_padded * 8))


@triton.jit
def as_tile(lower, upper, BLOCK_N: tl.constexpr, CODE: tl.constexpr):
    """``load_words`` as a tile [BLOCK_N, 32], in the order of a tensor core's operand, so that nothing moves.

    For PTX int16: an element is half of its pair's word. For plain Triton, which sees one column at a time, int32: the two
    bytes of its column.
    """
    # strip, row of eight, pair of the lane, pairs / 2, pairs % 2
    lower = tl.reshape(lower, (BLOCK_N // 16, 8, 4, 2, 2))
    upper = tl.reshape(upper, (BLOCK_N // 16, 8, 4, 2, 2))
    words = tl.join(lower, upper)
    if CODE is not None:
        columns = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    else:
        columns = tl.join(words & 0xFF | (words >> 8) & 0xFF00, (words >> 8) & 0xFF | (words >> 16) & 0xFF00)
    return columns.permute(0, 5, 1, 3, 4, 2, 6).reshape(BLOCK_N, 32)


@triton.jit
def weights(words, WIDTH: tl.constexpr, HALF: tl.constexpr, RULE: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr):
    """The eight tiles of a half of a block, DTYPE [rows, 32], in units of scale times ``factor``.

    ``words`` is a tuple: ``as_tile`` of as many planes as the width needs.
    """
    if CODE is not None:
        text: tl.constexpr = _text(CODE, WIDTH, HALF, RULE)
        constraints: tl.constexpr = _constraints(CODE, WIDTH, HALF, RULE)
        bits = tl.inline_asm_elementwise(text, constraints, words, (tl.int16,) * 8, True, 2)
        tiles = ()
        for field in tl.static_range(8):
            tiles = tiles + (bits[field].to(DTYPE, bitcast=True),)
    else:
        tiles = ()
        for field in tl.static_range(8):
            tiles = tiles + (_level(_code(words, field, bits_needed(WIDTH, RULE), HALF), 8 - WIDTH, RULE).to(DTYPE),)
    return tiles


@triton.jit
def _code(words, FIELD: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):
    """Codes of one field from the bytes of one column, int32; the lower byte has fields 0 to 3."""
    code = ((words[0] >> (2 * FIELD)) & 3) << 6
    if BITS >= 3:
        code |= ((words[1] >> (2 * FIELD + HALF)) & 1) << 5
    if BITS >= 4:
        code |= ((words[2] >> (2 * FIELD + HALF)) & 1) << 4
    if BITS >= 6:
        code |= ((words[3] >> (2 * FIELD)) & 3) << 2
    if BITS >= 8:
        code |= (words[4] >> (2 * FIELD)) & 3
    return code


@triton.jit
def _level(code, DROP: tl.constexpr, RULE: tl.constexpr):
    """core.slicing.levels, float32."""
    part = code >> DROP
    if RULE == "round":
        if DROP > 0:
            part = tl.minimum(part + ((code >> (DROP - 1)) & 1), (1 << (8 - DROP)) - 1)
        level = (part << DROP).to(tl.float32) - _ZERO
    else:
        level = (part << DROP).to(tl.float32) + (0.5 * (1 << DROP) - _ZERO)
    if RULE == "curved":
        level = level * (_LINEAR + _SQUARE * tl.abs(level))
    return level
