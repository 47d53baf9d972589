"""Sums of a tile over units of K, as stages of words and x come, for the wide product (kernels.wide)."""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from matgptq_vllm.kernels.gemm import with_slot
from matgptq_vllm.kernels.gluon_names import barrier
from matgptq_vllm.kernels.lanes import bits_needed
from matgptq_vllm.kernels.lanes import unit as unit_of_weights
from matgptq_vllm.kernels.wide_layouts import WARPS, sums_layout
from matgptq_vllm.kernels.wide_ring import next_stage
from matgptq_vllm.kernels.wide_weights import half_weights, tiles_scales, unit_words


@gluon.jit
def no_sums(ROWS: gl.constexpr, TILES: gl.constexpr):
    """Zeros, TILES times float32 [64, ROWS]."""
    sums = ()
    for _ in gl.static_range(TILES):
        sums = sums + (gl.zeros([16 * WARPS, ROWS], gl.float32, sums_layout(WARPS, ROWS)),)
    return sums


@gluon.jit
def tile_sums(
    sums, xs, ring, full, empty, scales, tile, last_tile, first, last, units_k, at,
    DTYPE: gl.constexpr, PART: gl.constexpr, WIDTH: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Sums, TILES times float32 [64, ROWS], plus those over units first to last, weights read at WIDTH; the next stages.

    ``at`` has the stage of words and its phase, and those of x, of which a unit takes two.
    """
    BITS: gl.constexpr = bits_needed(WIDTH, RULE)
    SUMS: gl.constexpr = sums_layout(WARPS, ROWS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    STEPS: gl.constexpr = 2 * TILES
    slot, phase, x_slot, x_phase = at
    end = last - 1
    scale_words = tiles_scales(scales, tile, last_tile, first, units_k, GROUP, TILES)
    next_scales = tiles_scales(scales, tile, last_tile, gl.minimum(first + 1, end), units_k, GROUP, TILES)
    mbarrier.wait(full[0].index(slot), phase)
    words = unit_words(ring, slot, PART * TILES, BITS)
    weights = half_weights(words, scale_words[0], 0, DTYPE, WIDTH, RULE, GROUP, CODE, LEFT)
    for unit in range(first, last):
        later_scales = tiles_scales(scales, tile, last_tile, gl.minimum(unit + 2, end), units_k, GROUP, TILES)
        x_slots = (2 * slot, 2 * slot + 1)
        operands = (weights,)
        for step in gl.static_range(STEPS):
            if len(full) == 2 and step < 2:
                x_slots = with_slot(x_slots, step, x_slot, 2)
                mbarrier.wait(full[1].index(x_slot), x_phase)
                x_slot, x_phase = next_stage(x_slot, x_phase, HALVES)
            right = _first_rows(xs.index(x_slots[step % 2]), ROWS).permute((1, 0))
            product = warpgroup_mma(operands[step], right, sums[step // 2], is_async=True)
            sums = with_slot(sums, step // 2, product, TILES)
            if ROWS >= 128 and step >= 1:
                # Registers are short: the operand before this one gives its up.
                waited = warpgroup_mma_wait(1, deps=sums + (operands[step],))
                sums = _leading(waited, TILES)
                operands = with_slot(operands, step, waited[TILES], step + 1)
            if step + 1 < STEPS:
                if step % 2 == 1:
                    words = unit_words(ring, slot, PART * TILES + step // 2 + 1, BITS)
                made = half_weights(words, scale_words[(step + 1) // 2], (step + 1) % 2, DTYPE, WIDTH, RULE, GROUP, CODE, LEFT)
                operands = operands + (made,)
        used = slot
        slot, phase = next_stage(slot, phase, STAGES)
        if unit < end:
            mbarrier.wait(full[0].index(slot), phase)
        words = unit_words(ring, slot, PART * TILES, BITS)
        made = half_weights(words, next_scales[0], 0, DTYPE, WIDTH, RULE, GROUP, CODE, LEFT)
        # Registers of an operand must stay as they are until the product is done.
        in_flight = operands if ROWS < 128 else (operands[STEPS - 1],)
        waited = warpgroup_mma_wait(0, deps=sums + in_flight + (made,))
        sums = _leading(waited, TILES)
        weights = waited[len(waited) - 1]
        # All warps have read the stages.
        barrier()
        mbarrier.arrive(empty[0].index(used), count=1)
        if len(empty) == 2:
            mbarrier.arrive(empty[1].index(x_slots[0]), count=1)
            mbarrier.arrive(empty[1].index(x_slots[1]), count=1)
        scale_words, next_scales = next_scales, later_scales
    return sums, (slot, phase, x_slot, x_phase)


@gluon.jit
def in_common_units(sums, WIDTH: gl.constexpr, RULE: gl.constexpr, TILES: gl.constexpr, CODE: gl.constexpr):
    """Sums of products with weights read at WIDTH, in the units that all widths have."""
    if unit_of_weights(CODE, WIDTH, RULE) != 1.0:
        result = ()
        for part in gl.static_range(TILES):
            result = result + (sums[part] * unit_of_weights(CODE, WIDTH, RULE),)
        sums = result
    return sums


@gluon.jit
def _first_rows(x, ROWS: gl.constexpr):
    """The first ROWS rows of a stage of x."""
    if x.shape[0] != ROWS:
        x = x.slice(0, ROWS)
    return x


@gluon.jit
def _leading(values, COUNT: gl.constexpr):
    """The first COUNT of the values."""
    result = ()
    for index in gl.static_range(COUNT):
        result = result + (values[index],)
    return result
