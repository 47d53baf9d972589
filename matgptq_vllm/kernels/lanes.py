"""Triton functions from words of the kernel layout to tiles of weights: through PTX on NVIDIA GPUs, in plain Triton elsewhere.

Both forms give ``core.slicing`` levels divided by ``factor``; the plain form computes levels in float32 and rounds once.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from matgptq_vllm.core.slicing import BEND_LINEAR, BEND_SQUARE, ZERO_LEVEL
from matgptq_vllm.kernels import lanes_ptx

_ZERO = tl.constexpr(float(ZERO_LEVEL))
_LINEAR = tl.constexpr(BEND_LINEAR)
_SQUARE = tl.constexpr(BEND_SQUARE)


bits_needed = triton.constexpr_function(lanes_ptx.bits_needed)


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
def load_words(plane, offsets, CODE: tl.constexpr):
    """Words of a plane, int16. For plain Triton, which sees one column at a time, a pair of them: the word's two halves."""
    if CODE is not None:
        words = tl.load(plane + offsets)
    else:
        even = offsets // 2 * 2
        byte = (offsets % 2) * 8
        words = (tl.load(plane + even).to(tl.int32) >> byte) & 0xFF
        words |= ((tl.load(plane + even + 1).to(tl.int32) >> byte) & 0xFF) << 8
    return words


@triton.jit
def weights(words, WIDTH: tl.constexpr, HALF: tl.constexpr, RULE: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr):
    """The eight tiles of a half of a block, DTYPE [rows, 32], in units of scale times ``factor``.

    ``words`` is a tuple: ``load_words`` of as many planes as the width needs.
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
