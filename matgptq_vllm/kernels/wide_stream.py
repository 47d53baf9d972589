"""The wide product (kernels.wide) in equal shares: a program has a range of the units of all tiles, one tile after the other.

So no program is idle while others compute a last tile (stream-K, Osama et al. 2023). It is for rows of one width and at least
as many tiles as programs, so that two at most share a tile. Where a range begins within a tile, the program leaves its sums of
that tile before anything else; the one that has the tile's first units comes to it last, and starts from them. Ranges are dealt
out from the last to the first, so that nobody waits for a program that is started later.
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels.gluon_names import barrier, wait_and_let_next_start, wait_for_others
from matgptq_vllm.kernels.lanes import bits_needed
from matgptq_vllm.kernels.wide_config import GROUPS
from matgptq_vllm.kernels.wide_layouts import WARPS, sums_layout
from matgptq_vllm.kernels.wide_output import write_tile
from matgptq_vllm.kernels.wide_ring import bring_row_tile, copy_first_units
from matgptq_vllm.kernels.wide_sums import in_common_units, no_sums, tile_sums

_GROUPS = gl.constexpr(GROUPS)


@gluon.jit
def _own_range():
    """Number of this program's range."""
    return gl.num_programs(0) - 1 - gl.program_id(0)


@gluon.jit
def _start(number, tiles, units_k):
    """First unit of a range, counted over all tiles; that of the next one is its end."""
    return number * (tiles * units_k) // gl.num_programs(0)


@gluon.jit
def _end_within_tile(unit, end, units_k):
    """Of the tile that ``unit`` is in, the end of the units before ``end``, counted within the tile."""
    return gl.minimum(end - unit // units_k * units_k, units_k)


@gluon.jit
def consume_range(
    xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, m, tiles, row_tiles, last_tile, n, units_k,
    PART: gl.constexpr, WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr, PDL: gl.constexpr,
    CODE: gl.constexpr,
):  # fmt: skip
    """Multiply a warpgroup's outputs of one tile after the other; store sums, or leave them for who has the tile's start."""
    own = _own_range()
    unit, end = _start(own, tiles, units_k), _start(own + 1, tiles, units_k)
    at = (0, 0, 0, 0)
    while unit < end:
        number = unit // units_k
        first, last = unit % units_k, _end_within_tile(unit, end, units_k)
        tile, row_tile = number // row_tiles, number % row_tiles
        tile = (tile * _GROUPS + PART) * (TILES * WARPS)
        sums = no_sums(BLOCK_M, TILES)
        if last < units_k:
            # The next range has begun with the rest of this tile.
            slot = (own + 1) * _GROUPS + PART
            while gl.atomic_add(locks + slot, 0, sem="acquire") == 0:
                pass
            sums = _left(workspace, slot, BLOCK_M, TILES)
            gl.store(locks + slot, 0)
        sums, at = tile_sums(
            sums, xs, ring, full, empty, scales, tile, last_tile, first, last, units_k, at, y_ptr.dtype.element_ty, PART,
            WIDTHS[0], RULE, GROUP, BLOCK_M, TILES, STAGES, HALVES, CODE,
        )  # fmt: skip
        if PDL:
            # The kernel before this one may still write or read what is written here.
            wait_for_others()
        if first > 0:
            slot = own * _GROUPS + PART
            _leave(sums, workspace, slot, BLOCK_M, TILES)
            barrier()
            gl.atomic_add(locks + slot, 1, sem="release")
        else:
            start = row_tile * BLOCK_M
            write_tile(
                in_common_units(sums, WIDTHS[0], RULE, TILES, CODE), scales, bias, y_ptr, locks, tile, start, m - start, n,
                WIDTHS, RULE, GROUP, HAS_BIAS, BLOCK_M, TILES,
            )  # fmt: skip
        unit += last - first


@gluon.jit
def _places(workspace, slot, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """Where a share has its first part's sums, [64, BLOCK_M]: a lane's pairs are adjacent. Those of no rows are 0."""
    SUMS: gl.constexpr = sums_layout(WARPS, BLOCK_M)
    output = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, SUMS))
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
    return workspace + slot.to(gl.int64) * (BLOCK_M * 16 * WARPS * TILES) + (output[:, None] * BLOCK_M + row[None, :])


@gluon.jit
def _leave(sums, workspace, slot, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    places = _places(workspace, slot, BLOCK_M, TILES)
    for part in gl.static_range(TILES):
        gl.store(places + part * (16 * WARPS * BLOCK_M), sums[part])


@gluon.jit
def _left(workspace, slot, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """Sums that were left."""
    places = _places(workspace, slot, BLOCK_M, TILES)
    sums = ()
    for part in gl.static_range(TILES):
        sums = sums + (gl.load(places + part * (16 * WARPS * BLOCK_M), cache_modifier=".cg"),)
    return sums


@gluon.jit
def bring_range(
    xs, ring, full, empty, x_desc, plane0, plane1, plane2, plane3, plane4, tiles, row_tiles, last_tile, units_k,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As ``wide_ring.bring``, for the units of a range."""
    BITS: gl.constexpr = bits_needed(WIDTHS[0], RULE)
    planes = (plane0, plane1, plane2, plane3, plane4)
    own = _own_range()
    unit, end = _start(own, tiles, units_k), _start(own + 1, tiles, units_k)
    number, first, last = unit // units_k, unit % units_k, _end_within_tile(unit, end, units_k)
    tile = number // row_tiles * (TILES * WARPS)
    copy_first_units(ring, full, planes, tile, last_tile, first, last, units_k, BITS, TILES, STAGES)
    if PDL:
        # Weights are older than any kernel that may still run; x is not.
        wait_and_let_next_start()
    # The first stages are free: the wait for the phase before the first returns at once.
    at = (0, 1, 0, 1)
    ahead = first + STAGES
    while unit < end:
        at = bring_row_tile(
            xs, ring, full, empty, x_desc, planes, tile, last_tile, number % row_tiles * BLOCK_M, first, last, ahead, units_k,
            at, BITS, BLOCK_M, TILES, STAGES, HALVES,
        )  # fmt: skip
        # A later tile begins with its first unit.
        unit += last - first
        number += 1
        tile, first, last, ahead = number // row_tiles * (TILES * WARPS), 0, _end_within_tile(unit, end, units_k), 0
