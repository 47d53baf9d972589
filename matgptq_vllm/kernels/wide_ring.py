"""Who brings words of the planes, and x, to shared memory for the wide product (kernels.wide), as stages are free."""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from matgptq_vllm.kernels.gluon_names import copy_async, load_tile, wait_and_let_next_start
from matgptq_vllm.kernels.lanes import bits_needed
from matgptq_vllm.kernels.wide_layouts import WARPS, words_layout
from matgptq_vllm.kernels.wide_rows import row_tile_of


@gluon.jit
def new_ring(BITS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr):
    """Shared memory for words: per plane [STAGES, words of a unit for all tiles and warps]."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SIZE: gl.constexpr = TILES * 128
    ring = (gl.allocate_shared_memory(gl.int32, [STAGES, SIZE * 4], FLAT),)
    if BITS >= 3:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, SIZE * 2], FLAT),)
    if BITS >= 4:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, SIZE * 2], FLAT),)
    if BITS >= 6:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, SIZE * 4], FLAT),)
    if BITS >= 8:
        ring = ring + (gl.allocate_shared_memory(gl.int32, [STAGES, SIZE * 4], FLAT),)
    return ring


@gluon.jit
def _copy_words(to, plane, tile, last_tile, unit, units_k, COUNT: gl.constexpr, TILES: gl.constexpr):
    """A unit's words of one plane, COUNT per lane and tile."""
    SIZE: gl.constexpr = 32 * COUNT
    word = gl.arange(0, TILES * WARPS * SIZE, layout=words_layout(WARPS, COUNT, TILES))
    of_tile = gl.minimum(tile + word // SIZE, last_tile)
    copy_async(to, plane + (of_tile * (units_k * SIZE) + unit * SIZE + word % SIZE))


@gluon.jit
def _copy_unit(ring, planes, tile, last_tile, unit, units_k, slot, BITS: gl.constexpr, TILES: gl.constexpr):
    """Start to copy words of a unit to a slot."""
    _copy_words(ring[0].index(slot), planes[0], tile, last_tile, unit, units_k, 4, TILES)
    if BITS >= 3:
        _copy_words(ring[1].index(slot), planes[1], tile, last_tile, unit, units_k, 2, TILES)
    if BITS >= 4:
        _copy_words(ring[2].index(slot), planes[2], tile, last_tile, unit, units_k, 2, TILES)
    if BITS >= 6:
        _copy_words(ring[3].index(slot), planes[3], tile, last_tile, unit, units_k, 4, TILES)
    if BITS >= 8:
        _copy_words(ring[4].index(slot), planes[4], tile, last_tile, unit, units_k, 4, TILES)


@gluon.jit
def copy_first_units(
    ring, full, planes, tile, last_tile, first, last, units_k, BITS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr
):
    """Start to copy words of units from ``first`` on, as many as there are stages, all of which are free."""
    for stage in gl.static_range(STAGES):
        if first + stage < last:
            _copy_unit(ring, planes, tile, last_tile, first + stage, units_k, stage, BITS, TILES)
            async_copy.mbarrier_arrive(full[0].index(stage), increment_count=False)


@gluon.jit
def bring(
    xs, ring, full, empty, x_desc, plane0, plane1, plane2, plane3, plane4, rows_of_widths, tile, last_tile, row_tile, row_step,
    first, last, units_k,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Copy words of all tiles, and x, to shared memory: unit by unit of one row tile after the other, as stages are free."""
    planes = (plane0, plane1, plane2, plane3, plane4)
    width, _ = row_tile_of(rows_of_widths, row_tile, WIDTHS, BLOCK_M)
    for index in gl.static_range(len(WIDTHS)):
        if width == WIDTHS[index]:
            copy_first_units(
                ring, full, planes, tile, last_tile, first, last, units_k, bits_needed(WIDTHS[index], RULE), TILES, STAGES
            )
    if PDL:
        # Weights are older than any kernel that may still run; x is not.
        wait_and_let_next_start()
    # The first stages are free: the wait for the phase before the first returns at once.
    at = (0, 1, 0, 1)
    ahead = first + STAGES
    while width != 0:
        for index in gl.static_range(len(WIDTHS)):
            if width == WIDTHS[index]:
                at = bring_row_tile(
                    xs, ring, full, empty, x_desc, planes, tile, last_tile, row_tile * BLOCK_M, first, last, ahead, units_k, at,
                    bits_needed(WIDTHS[index], RULE), BLOCK_M, TILES, STAGES, HALVES,
                )  # fmt: skip
        ahead = first
        row_tile += row_step
        width, _ = row_tile_of(rows_of_widths, row_tile, WIDTHS, BLOCK_M)


@gluon.jit
def bring_row_tile(
    xs, ring, full, empty, x_desc, planes, tile, last_tile, first_row, first, last, ahead, units_k, at,
    BITS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Units first to last of a row tile, the words of those before ``ahead`` being on their way; the next stages."""
    slot, phase, x_slot, x_phase = at
    if len(full) == 1:
        for unit in range(first, last):
            mbarrier.wait(empty[0].index(slot), phase)
            mbarrier.expect(full[0].index(slot), BLOCK_M * 256)
            for half in gl.static_range(2):
                load_tile(x_desc, [first_row, unit * 128 + half * 64], full[0].index(slot), xs.index(slot * 2 + half))
            if unit >= ahead:
                _copy_unit(ring, planes, tile, last_tile, unit, units_k, slot, BITS, TILES)
                async_copy.mbarrier_arrive(full[0].index(slot), increment_count=False)
            slot, phase = next_stage(slot, phase, STAGES)
    else:
        # Words come from further away than x: where there are more stages for them, they are asked for a unit earlier.
        EARLY: gl.constexpr = 1 if 2 * STAGES > HALVES + 1 else 0
        for step in range(first - EARLY, last):
            unit = step + EARLY
            if unit < last:
                if unit >= ahead:
                    mbarrier.wait(empty[0].index(slot), phase)
                    _copy_unit(ring, planes, tile, last_tile, unit, units_k, slot, BITS, TILES)
                    async_copy.mbarrier_arrive(full[0].index(slot), increment_count=False)
                slot, phase = next_stage(slot, phase, STAGES)
            if step >= first:
                for half in gl.static_range(2):
                    mbarrier.wait(empty[1].index(x_slot), x_phase)
                    mbarrier.expect(full[1].index(x_slot), BLOCK_M * 128)
                    load_tile(x_desc, [first_row, step * 128 + half * 64], full[1].index(x_slot), xs.index(x_slot))
                    x_slot, x_phase = next_stage(x_slot, x_phase, HALVES)
    return slot, phase, x_slot, x_phase


@gluon.jit
def next_stage(slot, phase, STAGES: gl.constexpr):
    """The stage after ``slot``, and the phase in which it is used."""
    slot += 1
    if slot == STAGES:
        slot, phase = 0, phase ^ 1
    return slot, phase
