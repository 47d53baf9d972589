"""The product for some tens to hundreds of rows: y = x @ W.T with Hopper's asynchronous tensor core products (wgmma).

A program computes 64 or 128 outputs for up to 128 rows of one width. Its warps copy words of the planes and x, some units of K
ahead, into shared memory; a warp makes weights of 16 outputs from words in registers, scaled, in the order in which they are
the left operand of the product with x, which is read from shared memory. The layout of planes (kernels.layout) is that of the
product for few rows (kernels.gemm): a warp's part of the left operand is the same for both kinds of tensor core products.
x has been arranged for it (kernels.arrange).

Widths are looked up on the device: row tiles have rows of one width each, and a tile whose width is 0 has none. Written in
Gluon, Triton's language of explicit layouts, because registers and shared memory have to be laid out as said.
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.arrange import Arranged
from matgptq_vllm.kernels.lanes import bits_needed, factor
from matgptq_vllm.kernels.layout import PLANE_WIDTHS, UNIT_N
from matgptq_vllm.kernels.wide_config import WideConfig
from matgptq_vllm.kernels.wide_ptx import WideCode

# Triton 3.6 has other names than later releases.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@triton.constexpr_function
def _assembly(code, width, rule, scaled):
    return code.scaled_weights(width, rule, scaled)


@triton.constexpr_function
def _sixteen(dtype):
    return (dtype,) * 16


@triton.constexpr_function
def _warp_bases(warps, dims, stride):
    bases, warp = [], 1
    while warp < warps:
        bases.append([warp * stride] + [0] * (dims - 1))
        warp *= 2
    return bases


@triton.constexpr_function
def _words_layout(warps, count):
    """[warps * 32 * count]: ``count`` adjacent words per lane, 1, 2 or 4."""
    registers = [[1], [2]][: count // 2]
    lanes = [[count << bit] for bit in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, _warp_bases(warps, 1, 32 * count), [], [warps * 32 * count])


@triton.constexpr_function
def _pieces_layout(warps):
    """[warps, g, j, 2]: two elements per lane 4g + j."""
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 0, 1]], lanes, _warp_bases(warps, 4, 1), [], [warps, 8, 4, 2])


@triton.constexpr_function
def _sums_layout(warps, rows):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, rows, 16])


@gluon.jit
def _ring(BITS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory for words: per plane [STAGES, words of a unit for all warps]."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = (gl.allocate_shared_memory(gl.int32, [STAGES, WARPS * 128], FLAT),)
    if BITS >= 3:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, WARPS * 64], FLAT),)
    if BITS >= 4:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, WARPS * 64], FLAT),)
    if BITS >= 6:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, WARPS * 128], FLAT),)
    if BITS >= 8:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, WARPS * 128], FLAT),)
    return ring


@gluon.jit
def _copy_words(to, plane, tile, unit, units_k, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """A unit's words of one plane, COUNT per lane; warp w has the unit of tile + w."""
    LAYOUT: gl.constexpr = _words_layout(WARPS, COUNT)
    SIZE: gl.constexpr = 32 * COUNT
    word = gl.arange(0, WARPS * SIZE, layout=LAYOUT)
    _copy(to, plane + ((tile + word // SIZE) * (units_k * SIZE) + unit * SIZE + word % SIZE))


@gluon.jit
def _copy_unit(
    xs, ring, x_ptr, planes, first_row, rows, tile, unit, units_k, slot,
    BITS: gl.constexpr, BLOCK_M: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Start to copy x and words of a unit to a slot."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    start = x_ptr + (unit * rows + first_row).to(gl.int64) * 128
    _copy(xs.index(slot), start + (row[:, None] * 128 + column[None, :]))
    _copy_words(ring[0].index(slot), planes[0], tile, unit, units_k, 4, WARPS)
    if BITS >= 3:
        _copy_words(ring[1].index(slot), planes[1], tile, unit, units_k, 2, WARPS)
    if BITS >= 4:
        _copy_words(ring[2].index(slot), planes[2], tile, unit, units_k, 2, WARPS)
    if BITS >= 6:
        _copy_words(ring[3].index(slot), planes[3], tile, unit, units_k, 4, WARPS)
    if BITS >= 8:
        _copy_words(ring[4].index(slot), planes[4], tile, unit, units_k, 4, WARPS)
    async_copy.commit_group()


@gluon.jit
def _words_of_pairs(shared, WARPS: gl.constexpr):
    """Words of a two-bit plane: of pieces 0 and 1, and of 2 and 3, each [WARPS, 8, 4, 2]."""
    words = gl.reshape(shared.load(_words_layout(WARPS, 4)), (WARPS, 8, 4, 2, 2))
    return gl.split(gl.permute(words, (0, 1, 2, 4, 3)))


@gluon.jit
def _words_of_singles(shared, WARPS: gl.constexpr):
    """As ``_words_of_pairs`` for a one-bit plane, whose words serve two pieces."""
    first, second = gl.split(gl.reshape(shared.load(_words_layout(WARPS, 2)), (WARPS, 8, 4, 2)))
    return gl.join(first, first), gl.join(second, second)


@gluon.jit
def _scale_words(scales, tile, group, groups, WARPS: gl.constexpr):
    """Scales of outputs g and g + 8, bfloat16, in the halves of a word: [WARPS, 8, 4]."""
    LAYOUT: gl.constexpr = _words_layout(WARPS, 1)
    lane = gl.arange(0, WARPS * 32, layout=LAYOUT)
    place = ((tile + lane // 32) * groups + group) * 8 + lane // 4 % 8
    if scales.dtype.element_ty.primitive_bitwidth == 16:
        word = gl.load(scales.to(gl.pointer_type(gl.int32), bitcast=True) + place)
    else:
        low = gl.load(scales + 2 * place).to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32)
        high = gl.load(scales + 2 * place + 1).to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32)
        word = (high << 16) | (low & 0xFFFF)
    return gl.reshape(word, (WARPS, 8, 4))


@gluon.jit
def _unit_scales(scales, tile, unit, units_k, GROUP: gl.constexpr, WARPS: gl.constexpr):
    """Words of scales per group of a unit; none if there is one scale per channel."""
    words = ()
    if GROUP != -1:
        GROUPS: gl.constexpr = 128 // GROUP
        for group in gl.static_range(GROUPS):
            words = words + (_scale_words(scales, tile, unit * GROUPS + group, units_k * GROUPS, WARPS),)
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
    WARPS: gl.constexpr,
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
def _unit_weights(
    ring, slot, scales,
    DTYPE: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, CODE: gl.constexpr, WARPS: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Weights of a unit for each warp: [16 * WARPS, 128], the left operand of a product with x as it is arranged."""
    BITS: gl.constexpr = bits_needed(WIDTH, RULE)
    one, other = _words_of_pairs(ring[0].index(slot), WARPS)
    first, second = (one,), (other,)
    if BITS >= 3:
        one, other = _words_of_singles(ring[1].index(slot), WARPS)
        first, second = first + (one,), second + (other,)
    if BITS >= 4:
        one, other = _words_of_singles(ring[2].index(slot), WARPS)
        first, second = first + (one,), second + (other,)
    if BITS >= 6:
        one, other = _words_of_pairs(ring[3].index(slot), WARPS)
        first, second = first + (one,), second + (other,)
    if BITS >= 8:
        one, other = _words_of_pairs(ring[4].index(slot), WARPS)
        first, second = first + (one,), second + (other,)
    SCALED: gl.constexpr = GROUP != -1
    first = _weights_of_pieces(first + _scales_of_pieces(scales, 0, GROUP), DTYPE, WIDTH, RULE, SCALED, CODE, WARPS)
    second = _weights_of_pieces(second + _scales_of_pieces(scales, 1, GROUP), DTYPE, WIDTH, RULE, SCALED, CODE, WARPS)
    # warp, g, j, l, e, u, i, piece, half -> row (warp, e, g), column (half, piece, i, u, j, l): all stays in its register.
    weights = gl.permute(gl.join(first, second), (0, 4, 1, 8, 7, 6, 5, 2, 3))
    return gl.convert_layout(gl.reshape(weights, (16 * WARPS, 128)), LEFT, assert_trivial=True)


@gluon.jit
def _tile_sums(
    xs, ring, x_ptr, planes, scales, first_row, rows, tile, first, last, units_k,
    WIDTH: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Sums over units first to last of a tile, its weights read at WIDTH: float32 [16 * WARPS, BLOCK_M]."""
    BITS: gl.constexpr = bits_needed(WIDTH, RULE)
    SUMS: gl.constexpr = _sums_layout(WARPS, BLOCK_M)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    end = last - 1
    for stage in gl.static_range(STAGES):
        _copy_unit(
            xs, ring, x_ptr, planes, first_row, rows, tile, gl.minimum(first + stage, end), units_k, stage, BITS, BLOCK_M, WARPS
        )
    sums = gl.zeros([16 * WARPS, BLOCK_M], gl.float32, SUMS)
    words = _unit_scales(scales, tile, first, units_k, GROUP, WARPS)
    async_copy.wait_group(STAGES - 1)
    _barrier()
    weights = _unit_weights(ring, 0, words, DTYPE, WIDTH, RULE, GROUP, CODE, WARPS, LEFT)
    words = _unit_scales(scales, tile, gl.minimum(first + 1, end), units_k, GROUP, WARPS)
    slot = 0
    for unit in range(first, last):
        following = gl.where(slot == STAGES - 1, 0, slot + 1)
        # The next unit is there, and the tensor cores may read x of this one.
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _barrier()
        product = warpgroup_mma(weights, xs.index(slot).permute((1, 0)), sums, is_async=True)
        others = _unit_weights(ring, following, words, DTYPE, WIDTH, RULE, GROUP, CODE, WARPS, LEFT)
        words = _unit_scales(scales, tile, gl.minimum(unit + 2, end), units_k, GROUP, WARPS)
        # Registers of an operand must stay as they are until the product is done.
        sums, weights, others = warpgroup_mma_wait(0, deps=(product, weights, others))
        weights = others
        _barrier()
        _copy_unit(
            xs, ring, x_ptr, planes, first_row, rows, tile, gl.minimum(unit + STAGES, end), units_k, slot, BITS, BLOCK_M, WARPS
        )
        slot = following
    async_copy.wait_group(0)
    return sums


@triton.constexpr_function
def _widest(widths):
    return widths[-1]


@gluon.jit(do_not_specialize=["m", "units_k"])
def _wide_kernel(
    x_ptr, tile_widths, row_places, plane0, plane1, plane2, plane3, plane4, scales, bias, y_ptr, workspace, locks,
    m, n, n_padded, units_k, rows,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, tiles of outputs, SPLIT)."""
    BITS: gl.constexpr = bits_needed(_widest(WIDTHS), RULE)
    SUMS: gl.constexpr = _sums_layout(WARPS, BLOCK_M)
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    row_tile, tile_n, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", (), gl.int32, False, 1)
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", (), gl.int32, False, 1)
    width = gl.load(tile_widths + row_tile)
    if width != 0:
        first, last = split * units_k // SPLIT, (split + 1) * units_k // SPLIT
        tile = tile_n * WARPS
        first_row = row_tile * BLOCK_M
        SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, 128], DTYPE)
        xs = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], SHARED)
        ring = _ring(BITS, STAGES, WARPS)
        planes = (plane0, plane1, plane2, plane3, plane4)
        sums = gl.zeros([16 * WARPS, BLOCK_M], gl.float32, SUMS)
        for index in gl.static_range(len(WIDTHS)):
            if width == WIDTHS[index]:
                sums = _tile_sums(
                    xs, ring, x_ptr, planes, scales, first_row, rows, tile, first, last, units_k, WIDTHS[index], RULE, GROUP,
                    BLOCK_M, WARPS, STAGES, CODE,
                )  # fmt: skip
        output = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, SUMS))
        outputs = tile_n * (16 * WARPS) + output
        place = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
        row = gl.load(row_places + place)
        if SPLIT > 1:
            # Every program leaves its sums; the last one to arrive adds them, always in the order of K.
            share = rows.to(gl.int64) * n_padded
            places = place[None, :].to(gl.int64) * n_padded + outputs[:, None]
            mask = (row >= 0)[None, :] & (outputs < n_padded)[:, None]
            gl.store(workspace + split * share + places, sums, mask=mask)
            _barrier()
            lock = locks + tile_n * gl.num_programs(0) + row_tile
            arrived = gl.atomic_add(lock, 1, sem="acq_rel")
            if arrived == SPLIT - 1:
                sums = gl.zeros([16 * WARPS, BLOCK_M], gl.float32, SUMS)
                for other in gl.static_range(SPLIT):
                    sums += gl.load(workspace + other * share + places, mask=mask, other=0.0, cache_modifier=".cg")
                gl.store(lock, 0)
                _finish(sums, scales, bias, y_ptr, tile, row, outputs, output, n, RULE, GROUP, HAS_BIAS)
        else:
            _finish(sums, scales, bias, y_ptr, tile, row, outputs, output, n, RULE, GROUP, HAS_BIAS)


@gluon.jit
def _finish(
    sums, scales, bias, y_ptr, tile, row, outputs, output, n, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr
):
    sums *= factor(RULE)
    exists = outputs < n
    if GROUP == -1:
        place = tile * 16 + output // 16 * 16 + output % 8 * 2 + output % 16 // 8
        sums *= gl.load(scales + place, mask=exists, other=0.0).to(gl.float32)[:, None]
    if HAS_BIAS:
        sums += gl.load(bias + outputs, mask=exists, other=0.0).to(gl.float32)[:, None]
    mask = (row >= 0)[None, :] & exists[:, None]
    gl.store(y_ptr + (row[None, :].to(gl.int64) * n + outputs[:, None]), sums.to(y_ptr.dtype.element_ty), mask=mask)


def wide_gemm(
    arranged: Arranged,
    y: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    config: WideConfig,
    locks: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill the rows of ``y`` that ``arranged`` has a width for with x @ W.T + bias, each at its width.

    Args:
        arranged: x, of ``arrange.arrange`` with the same ``config.block_m`` and ``widths``; bfloat16 or float16, on a Hopper
            GPU.
        y: [M, N], dtype of x.
        planes, scales, locks: as for ``gemm.sliced_gemm``.
        widths: every width that a row may have, ascending.
        bias: [N], any floating type.

    Returns:
        ``y``.
    """
    m, n = y.shape
    rows = arranged.x.shape[1]
    n_padded, units_k = scales.shape[0] * UNIT_N, planes[0].shape[1]
    split = min(config.split_k, units_k)
    workspace = y.new_empty((split, rows, n_padded), dtype=torch.float32) if split > 1 else y
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    grid = (rows // config.block_m, n_padded // (UNIT_N * config.num_warps), split)
    _wide_kernel[grid](
        arranged.x, arranged.tile_widths, arranged.row_places, *given, scales, y if bias is None else bias, y, workspace, locks,
        m, n, n_padded, units_k, rows,
        WIDTHS=tuple(widths), RULE=rule, GROUP=group_size, HAS_BIAS=bias is not None, SPLIT=split, BLOCK_M=config.block_m,
        WARPS=config.num_warps, STAGES=config.stages, PDL=config.pdl,
        CODE=WideCode("bf16" if y.dtype == torch.bfloat16 else "f16"), num_warps=config.num_warps, launch_pdl=config.pdl,
    )  # fmt: skip
    return y
