"""Triton functions from words of the kernel layout to weights and to their products with x.

A lane of a warp holds words and sums as one-dimensional tensors, an element per thread: element 32 * w + l belongs to lane l of
warp w. The functions that take them are PTX and run on NVIDIA GPUs only; ``plain_weights`` and ``core.slicing`` say the same
in plain Triton, for its interpreter.
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from matgptq_vllm.core.slicing import BEND, ZERO_LEVEL
from matgptq_vllm.kernels import lanes_ptx
from matgptq_vllm.kernels.layout import UNIT_K, UNIT_N

_ZERO = tl.constexpr(float(ZERO_LEVEL))
_BEND = tl.constexpr(BEND)
_UNIT_K = tl.constexpr(UNIT_K)
_UNIT_N = tl.constexpr(UNIT_N)

PAIR_WORDS = tl.constexpr(128)
"""Words per unit of a plane of two bits."""
SINGLE_WORDS = tl.constexpr(64)
"""Words per unit of a plane of one bit."""

num_terms = triton.constexpr_function(lanes_ptx.num_terms)
bits_needed = triton.constexpr_function(lanes_ptx.bits_needed)


@triton.constexpr_function
def factor(rule):
    """Levels per unit of the weights, of all widths of a rule."""
    return lanes_ptx.FACTOR[rule]


@triton.constexpr_function
def unit(code, width, rule):
    """What weights of a width are in, in units of ``factor`` levels."""
    return code.unit(width, rule)


@triton.constexpr_function
def _weights(code, width, half, rule):
    return code.weights(width, half, rule)


@triton.constexpr_function
def _product(code, first):
    return code.product(first)


@triton.constexpr_function
def _load_four(code):
    return code.load_four()


@triton.constexpr_function
def _load_two(code):
    return code.load_two()


@triton.constexpr_function
def place_of(piece, plane):
    """Where a piece's word of a plane is among the words of a unit that ``load_unit`` returns."""
    starts = (0, 4, 6, 8, 12)
    return starts[plane] + (piece // 2 if plane in (1, 2) else piece)


@triton.jit
def load_four(pointer, offsets, CODE: tl.constexpr):
    """Four adjacent 32-bit words per thread, of planes: int32 [T], four times. Addresses must be multiples of 16."""
    # Triton's own load would need its result taken apart, which costs no instruction but minutes of compilation.
    assembly: tl.constexpr = _load_four(CODE)
    addresses = (pointer + offsets).to(tl.int64)
    return tl.inline_asm_elementwise(assembly[0], assembly[1], (addresses,), (tl.int32,) * 4, False, 1)


@triton.jit
def load_two(pointer, offsets, CODE: tl.constexpr):
    """As ``load_four``, but two words; addresses must be multiples of 8."""
    assembly: tl.constexpr = _load_two(CODE)
    addresses = (pointer + offsets).to(tl.int64)
    return tl.inline_asm_elementwise(assembly[0], assembly[1], (addresses,), (tl.int32,) * 2, False, 1)


@triton.jit
def load_scales(scales, offsets, mask):
    """Scales of outputs g and g + 8, which lie next to each other: both in a word, or apart if they take one each."""
    # Values of two bytes would be packed, and thus waited for, as soon as they are loaded.
    if scales.dtype.element_ty.primitive_bitwidth == 16:
        result = (tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + offsets, mask=mask, other=0),)
    else:
        result = (
            tl.load(scales + 2 * offsets, mask=mask, other=0.0),
            tl.load(scales + 2 * offsets + 1, mask=mask, other=0.0),
        )
    return result


@triton.jit
def both_scales(pair):
    """What ``load_scales`` returned, bfloat16 or float32, as two float32."""
    if len(pair) == 2:
        result = pair
    else:
        word = pair[0]
        result = ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
    return result


@triton.jit
def scales_of_weights(pair, WIDTH: tl.constexpr, RULE: tl.constexpr, CODE: tl.constexpr):
    """As ``both_scales``, times the unit of weights read at WIDTH."""
    upper, lower = both_scales(pair)
    if unit(CODE, WIDTH, RULE) != 1.0:
        upper *= unit(CODE, WIDTH, RULE)
        lower *= unit(CODE, WIDTH, RULE)
    return upper, lower


@triton.jit
def plain_scales(scales, outputs, group, groups):
    """Scales of outputs in a group, float32; ``groups`` is how many there are."""
    place = (outputs // 16 * groups + group) * 16 + outputs % 8 * 2 + outputs % 16 // 8
    return tl.load(scales + place).to(tl.float32)


@triton.jit
def load_unit(
    planes, unit, lane, mask, mask3, mask4, mask6, mask8,
    BITS: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """A lane's words of a unit of the planes that BITS bits need.

    Args:
        unit, lane, mask: [T] number of the unit, lane, and whether the unit is wanted.
        mask3, mask4, mask6, mask8: as ``mask``, for the planes that are needed from so many bits on.
    """
    # What is not wanted is not skipped, which would keep old words alive in registers, but read from one place that is in
    # the cache: the start of plane 0, as a plane that no row needs may have no memory (engine.elastic).
    pair, single = unit * PAIR_WORDS + 4 * lane, unit * SINGLE_WORDS + 2 * lane
    start = planes[0]
    words = load_four(tl.where(mask, start + pair, start), 0, CODE)
    if BITS >= 3:
        words = words + load_two(tl.where(mask3, planes[1] + single, start), 0, CODE)
    if BITS >= 4:
        words = words + load_two(tl.where(mask4, planes[2] + single, start), 0, CODE)
    if BITS >= 6:
        words = words + load_four(tl.where(mask6, planes[3] + pair, start), 0, CODE)
    if BITS >= 8:
        words = words + load_four(tl.where(mask8, planes[4] + pair, start), 0, CODE)
    return words


@triton.jit
def piece_weights(words, PIECE: tl.constexpr, WIDTH: tl.constexpr, RULE: tl.constexpr, CODE: tl.constexpr):
    """Words of pairs of weights from the words of a unit, in units of scale times ``factor``: eight per term."""
    BITS: tl.constexpr = bits_needed(WIDTH, RULE)
    given = (words[place_of(PIECE, 0)],)
    if BITS >= 3:
        given = given + (words[place_of(PIECE, 1)],)
    if BITS >= 4:
        given = given + (words[place_of(PIECE, 2)],)
    if BITS >= 6:
        given = given + (words[place_of(PIECE, 3)],)
    if BITS >= 8:
        given = given + (words[place_of(PIECE, 4)],)
    assembly: tl.constexpr = _weights(CODE, WIDTH, PIECE % 2, RULE)
    return tl.inline_asm_elementwise(assembly[0], assembly[1], given, (tl.int32,) * (8 * num_terms(WIDTH, RULE)), False, 1)


@triton.jit
def multiply(pairs, x, sums, TERMS: tl.constexpr, FIRST: tl.constexpr, CODE: tl.constexpr):
    """Sums of 16 outputs for 8 rows, four per lane, plus the products of a piece.

    Args:
        pairs: of ``piece_weights``.
        x: four words of row lane / 4: word (lane mod 4) of each 8 elements of the piece.
        sums: float32, outputs g = lane / 4 and g + 8, rows r = 2 * (lane mod 4) and the next: (g, r), (g, r + 1), (g + 8, r).
            With FIRST they are not read.
    """
    for index in tl.static_range(2 * TERMS):
        sums = _multiply_once(pairs, x, sums, index, FIRST and index == 0, CODE)
    return sums


@triton.jit
def _multiply_once(pairs, x, sums, INDEX: tl.constexpr, FIRST: tl.constexpr, CODE: tl.constexpr):
    weight = (pairs[4 * INDEX], pairs[4 * INDEX + 1], pairs[4 * INDEX + 2], pairs[4 * INDEX + 3])
    given = weight + (x[2 * (INDEX % 2)], x[2 * (INDEX % 2) + 1])
    if not FIRST:
        given = given + sums
    assembly: tl.constexpr = _product(CODE, FIRST)
    return tl.inline_asm_elementwise(assembly[0], assembly[1], given, (tl.float32,) * 4, False, 1)


@triton.jit
def plain_weights(
    planes, row, column, units_k,
    WIDTH: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Levels of the weights at (row, column), float32, from their bits; the table in kernels.layout, read backwards."""
    BITS: tl.constexpr = bits_needed(WIDTH, RULE)
    unit = row // _UNIT_N * units_k + column // _UNIT_K
    e, g = row % 16 // 8, row % 8
    piece, j = column % 128 // 32, column % 8 // 2
    i, u, upper = column % 32 // 16, column % 16 // 8, column % 2
    n = 4 * upper + 2 * u + e
    lane = 4 * g + j
    q = 2 * (piece % 2) + i
    pair = unit * PAIR_WORDS + lane * 4 + piece
    single = unit * SINGLE_WORDS + lane * 2 + piece // 2
    word = tl.load(planes[0] + pair)
    negative = (word >> (4 * n + 3 - 2 * i)) & 1
    magnitude = ((word >> (4 * n + 2 - 2 * i)) & 1) << 6
    if BITS >= 3:
        magnitude |= ((tl.load(planes[1] + single) >> (4 * n + (q ^ 1))) & 1) << 5
    if BITS >= 4:
        magnitude |= ((tl.load(planes[2] + single) >> (4 * n + q)) & 1) << 4
    if BITS >= 6:
        magnitude |= ((tl.load(planes[3] + pair) >> (4 * n + 2 - 2 * i)) & 3) << 2
    if BITS >= 8:
        magnitude |= (tl.load(planes[4] + pair) >> (4 * n + 2 * i)) & 3
    return _level(tl.where(negative == 1, 127 - magnitude, 128 + magnitude), 8 - WIDTH, RULE)


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
        level = level * (1.0 + _BEND * tl.abs(level))
    return level
