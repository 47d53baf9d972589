"""From words in shared memory to weights in registers: the left operand of the wide product (kernels.wide)."""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels.wide_layouts import WARPS, warp_bases, words_layout


@triton.constexpr_function
def _assembly(code, width, rule, scaled):
    return code.scaled_weights(width, rule, scaled)


@triton.constexpr_function
def _sixteen(dtype):
    return (dtype,) * 16


@triton.constexpr_function
def _pieces_layout(warps):
    """[warps, g, j, 2]: two elements per lane 4g + j."""
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 0, 1]], lanes, warp_bases(warps, 4, 1), [], [warps, 8, 4, 2])


@gluon.jit
def _words_of_pairs(shared):
    """Words of a two-bit plane: of pieces 0 and 1, and of 2 and 3, each [WARPS, 8, 4, 2]."""
    words = gl.reshape(shared.load(words_layout(WARPS, 4)), (WARPS, 8, 4, 2, 2))
    return gl.split(gl.permute(words, (0, 1, 2, 4, 3)))


@gluon.jit
def _words_of_singles(shared):
    """As ``_words_of_pairs`` for a one-bit plane, whose words serve two pieces."""
    first, second = gl.split(gl.reshape(shared.load(words_layout(WARPS, 2)), (WARPS, 8, 4, 2)))
    return gl.join(first, first), gl.join(second, second)


@gluon.jit
def _scale_words(scales, tile, last_tile, group, groups):
    """Scales of outputs g and g + 8, bfloat16, in the halves of a word: [WARPS, 8, 4]."""
    LAYOUT: gl.constexpr = words_layout(WARPS, 1)
    lane = gl.arange(0, WARPS * 32, layout=LAYOUT)
    place = (gl.minimum(tile + lane // 32, last_tile) * groups + group) * 8 + lane // 4 % 8
    if scales.dtype.element_ty.primitive_bitwidth == 16:
        word = gl.load(scales.to(gl.pointer_type(gl.int32), bitcast=True) + place)
    else:
        low = gl.load(scales + 2 * place).to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32)
        high = gl.load(scales + 2 * place + 1).to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32)
        word = (high << 16) | (low & 0xFFFF)
    return gl.reshape(word, (WARPS, 8, 4))


@gluon.jit
def _unit_scales(scales, tile, last_tile, unit, units_k, GROUP: gl.constexpr):
    """Words of scales per group of a unit; none if there is one scale per channel."""
    words = ()
    if GROUP != -1:
        GROUPS: gl.constexpr = 128 // GROUP
        for group in gl.static_range(GROUPS):
            words = words + (_scale_words(scales, tile, last_tile, unit * GROUPS + group, units_k * GROUPS),)
    return words


@gluon.jit
def tiles_scales(scales, tile, last_tile, unit, units_k, GROUP: gl.constexpr, TILES: gl.constexpr):
    words = ()
    for part in gl.static_range(TILES):
        words = words + (_unit_scales(scales, tile + part * WARPS, last_tile, unit, units_k, GROUP),)
    return words


@gluon.jit
def _scales_of_pieces(words, HALF: gl.constexpr, GROUP: gl.constexpr):
    """Of pieces 2 * HALF and the next: [WARPS, 8, 4, 2], or nothing."""
    result = ()
    if GROUP == 128:
        result = (gl.join(words[0], words[0]),)
    elif GROUP == 64:
        result = (gl.join(words[HALF], words[HALF]),)
    elif GROUP == 32:
        result = (gl.join(words[2 * HALF], words[2 * HALF + 1]),)
    return result


@gluon.jit
def _weights_of_pieces(
    words, DTYPE: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, SCALED: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Weights of two pieces from their words: [WARPS, 8, 4, l, e, u, i, piece], see kernels.layout."""
    LAYOUT: gl.constexpr = _pieces_layout(WARPS)
    given = ()
    for index in gl.static_range(len(words)):
        given = given + (gl.convert_layout(words[index], LAYOUT, assert_trivial=True),)
    assembly: gl.constexpr = _assembly(CODE, WIDTH, RULE, SCALED)
    pairs = gl.inline_asm_elementwise(assembly[0], assembly[1], given, _sixteen(DTYPE), True, 2)
    return gl.join(_joined(pairs, 0), _joined(pairs, 8))


@gluon.jit
def _joined(pairs, FROM: gl.constexpr):
    """Eight tensors as one, with three more axes of two; the first of them changes fastest."""
    lower = gl.join(gl.join(pairs[FROM], pairs[FROM + 1]), gl.join(pairs[FROM + 2], pairs[FROM + 3]))
    upper = gl.join(gl.join(pairs[FROM + 4], pairs[FROM + 5]), gl.join(pairs[FROM + 6], pairs[FROM + 7]))
    return gl.join(lower, upper)


@gluon.jit
def unit_words(ring, slot, PART: gl.constexpr, BITS: gl.constexpr):
    """A lane's words of a unit of one tile: of pieces 0 and 1, and of 2 and 3, a tensor per plane."""
    PAIRS: gl.constexpr = WARPS * 128
    SINGLES: gl.constexpr = WARPS * 64
    one, other = _words_of_pairs(ring[0].index(slot).slice(PART * PAIRS, PAIRS))
    first, second = (one,), (other,)
    if BITS >= 3:
        one, other = _words_of_singles(ring[1].index(slot).slice(PART * SINGLES, SINGLES))
        first, second = first + (one,), second + (other,)
    if BITS >= 4:
        one, other = _words_of_singles(ring[2].index(slot).slice(PART * SINGLES, SINGLES))
        first, second = first + (one,), second + (other,)
    if BITS >= 6:
        one, other = _words_of_pairs(ring[3].index(slot).slice(PART * PAIRS, PAIRS))
        first, second = first + (one,), second + (other,)
    if BITS >= 8:
        one, other = _words_of_pairs(ring[4].index(slot).slice(PART * PAIRS, PAIRS))
        first, second = first + (one,), second + (other,)
    return first, second


@gluon.jit
def half_weights(
    words, scales, HALF: gl.constexpr,
    DTYPE: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, CODE: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Weights of two pieces of a unit for each warp: [16 * WARPS, 64], a left operand."""
    given = words[HALF] + _scales_of_pieces(scales, HALF, GROUP)
    weights = _weights_of_pieces(given, DTYPE, WIDTH, RULE, GROUP != -1, CODE)
    # warp, g, j, l, e, u, i, piece -> row (warp, e, g), column (piece, i, u, j, l): all stays in its register.
    weights = gl.permute(weights, (0, 4, 1, 7, 6, 5, 2, 3))
    return gl.convert_layout(gl.reshape(weights, (16 * WARPS, 64)), LEFT, assert_trivial=True)
