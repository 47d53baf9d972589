"""From sums of lanes to results in memory, for the product for few rows (kernels.small).

Programs that share tiles, each with a part of K, leave their sums in a workspace, float32 [share, row, output].
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels.gluon_names import barrier
from matgptq_vllm.kernels.small_x import element_layout


@triton.constexpr_function
def _sums_layout(warps):
    return gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])


@gluon.jit
def num_turns(n_padded, TILES: gl.constexpr):
    """How often a program computes TILES tiles."""
    return (n_padded // (16 * TILES) - gl.program_id(1) + gl.num_programs(1) - 1) // gl.num_programs(1)


@gluon.jit
def _rows_and_outputs(turn, ROWS: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, part=0, PARTS: gl.constexpr = 1):
    """Rows and outputs of the tiles of a turn, or of one of PARTS equal parts of them."""
    LAYOUT: gl.constexpr = _sums_layout(WARPS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    group = gl.program_id(1) + turn * gl.num_programs(1)
    size: gl.constexpr = 16 * TILES // PARTS
    return row, group * (16 * TILES) + part * size + gl.arange(0, size, layout=gl.SliceLayout(0, LAYOUT))


@gluon.jit
def tile_of_sums(totals, TILES_M: gl.constexpr, TILES: gl.constexpr, SHARES: gl.constexpr):
    """Sums of ``use_unit``, those of warps that share a tile added up -> [8 * TILES_M, 16 * TILES]."""
    tiles = ()
    for rows in gl.static_range(TILES_M):
        sums = totals[rows]
        upper, lower = gl.join(sums[0], sums[1]), gl.join(sums[2], sums[3])
        # share, tile, g, j, odd row, output + 8
        lanes = gl.reshape(gl.join(upper, lower), (SHARES, TILES, 8, 4, 2, 2))
        tiles = tiles + (gl.reshape(gl.permute(lanes, (0, 3, 4, 1, 5, 2)), (SHARES, 8, 16 * TILES)),)
    result = tiles[0]
    if TILES_M == 2:
        result = _above(tiles[0], tiles[1])
    elif TILES_M == 4:
        result = _above(_above(tiles[0], tiles[1]), _above(tiles[2], tiles[3]))
    return gl.convert_layout(gl.sum(result, axis=0), _sums_layout(SHARES * TILES))


@gluon.jit
def _above(first, second):
    """Two tensors [shares, rows, outputs] as one of twice the rows."""
    shape: gl.constexpr = (first.shape[0], 2 * first.shape[1], first.shape[2])
    return gl.reshape(gl.permute(gl.join(first, second), (0, 3, 1, 2)), shape)


@gluon.jit
def tile_of_pairs(totals, TILES: gl.constexpr, SHARES: gl.constexpr):
    """As ``tile_of_sums`` for ``use_unit_for_pairs``, those of both digits added up: row 0 of [2, 16 * TILES]."""
    # share, tile, g, row, digit, output + 8
    lanes = gl.reshape(gl.join(totals[0], totals[1]), (SHARES, TILES, 8, 2, 2, 2))
    lanes = gl.sum(lanes, axis=4)
    result = gl.reshape(gl.permute(lanes, (0, 3, 1, 4, 2)), (SHARES, 2, 16 * TILES))
    return gl.convert_layout(gl.sum(result, axis=0), _sums_layout(SHARES * TILES))


@gluon.jit
def tile_of_columns(totals, lane, TILES: gl.constexpr, SHARES: gl.constexpr):
    """As ``tile_of_sums`` for ``use_unit_for_columns``, those of both digits added up -> [4, 16 * TILES]."""
    worth = gl.where(lane % 4 >= 2, 1.0 / 256.0, 1.0)
    upper, lower = gl.join(totals[0] * worth, totals[1] * worth), gl.join(totals[2] * worth, totals[3] * worth)
    # share, tile, g, digit, rows, odd row, output + 8
    lanes = gl.sum(gl.reshape(gl.join(upper, lower), (SHARES, TILES, 8, 2, 2, 2, 2)), axis=3)
    result = gl.reshape(gl.permute(lanes, (0, 3, 4, 1, 5, 2)), (SHARES, 4, 16 * TILES))
    return gl.convert_layout(gl.sum(result, axis=0), _sums_layout(SHARES * TILES))


@gluon.jit
def write_turn(
    total, workspace, scales, bias, y_ptr, turn, m, n, n_padded,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Store the sums of a turn, [rows, 16 * TILES], or leave them where K is shared."""
    row, output = _rows_and_outputs(turn, total.shape[0], TILES, WARPS)
    if SPLIT > 1:
        places = row[:, None].to(gl.int64) * n_padded + output[None, :]
        mask = (row < m)[:, None] & (output < n_padded)[None, :]
        gl.store(workspace + gl.program_id(0) * (m.to(gl.int64) * n_padded) + places, total, mask=mask)
    else:
        _finish(total, scales, bias, y_ptr, row, output, m, n, GROUP, HAS_BIAS)


@gluon.jit
def share_sums(
    workspace, locks, scales, bias, y_ptr, m, n, n_padded,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr,
    WARPS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Add up what this program and those that share its tiles have left, always in the order of K."""
    lock = locks + gl.program_id(1)
    barrier()
    if TURNS == 1:
        # By the last program to arrive, which need not be told that it is the last.
        if gl.atomic_add(lock, 1, sem="acq_rel") == SPLIT - 1:
            _add_shares(workspace, scales, bias, y_ptr, 0, 0, 1, m, n, n_padded, GROUP, HAS_BIAS, SPLIT, ROWS, TILES, WARPS)
            gl.store(lock, 0)
    else:
        # By all programs, each a part, once they have all arrived.
        PARTS: gl.constexpr = _parts(SPLIT, TURNS)
        arrival = _wait_for_shares(lock, SPLIT, WARPS)
        barrier()
        for job in range(gl.program_id(0), num_turns(n_padded, TILES) * PARTS, SPLIT):
            _add_shares(
                workspace, scales, bias, y_ptr, job // PARTS, job % PARTS, PARTS, m, n, n_padded, GROUP, HAS_BIAS, SPLIT, ROWS,
                TILES, WARPS,
            )  # fmt: skip
        _free(lock, arrival, SPLIT, WARPS)


@triton.constexpr_function
def _parts(split, turns):
    """Into how many the tiles of a turn are cut, so that all of ``split`` programs have some to add up."""
    return max((1 << (split - 1).bit_length()) >> (turns - 1).bit_length(), 1)


@gluon.jit
def _add_shares(
    workspace, scales, bias, y_ptr, turn, part, PARTS: gl.constexpr, m, n, n_padded,
    GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add up what the programs have left of a turn, or of one of PARTS parts of it."""
    LOW: gl.constexpr = max(ROWS, 8)
    row, output = _rows_and_outputs(turn, LOW, TILES, WARPS, part, PARTS)
    places = row[:, None].to(gl.int64) * n_padded + output[None, :]
    mask = (row < m)[:, None] & (output < n_padded)[None, :]
    total = gl.full((LOW, 16 * TILES // PARTS), 0.0, gl.float32, _sums_layout(WARPS))
    for share in gl.static_range(SPLIT):
        left = workspace + share * (m.to(gl.int64) * n_padded) + places
        total += gl.load(left, mask=mask, other=0.0, cache_modifier=".cg")
    _finish(total, scales, bias, y_ptr, row, output, m, n, GROUP, HAS_BIAS)


@gluon.jit
def _wait_for_shares(lock, SPLIT: gl.constexpr, WARPS: gl.constexpr):
    """Tell that this program has left its sums, wait until all that share its tiles have; how many have seen that, per thread.

    Programs that share tiles are started one after the other, so that all of them run. One thread waits.
    """
    thread = gl.arange(0, 32 * WARPS, layout=element_layout(WARPS))
    locks = lock + thread * 0
    assembly: gl.constexpr = _waiting(SPLIT)
    return gl.inline_asm_elementwise(assembly, "=r,l,r", (locks, thread), gl.int32, False, 1)


@gluon.jit
def _free(lock, arrival, SPLIT: gl.constexpr, WARPS: gl.constexpr):
    """Set a lock to 0 if all programs have seen that all have left their sums."""
    thread = gl.arange(0, 32 * WARPS, layout=element_layout(WARPS))
    gl.store(lock + thread * 0, thread * 0, mask=(thread == 0) & (arrival == 2 * SPLIT - 1))


@triton.constexpr_function
def _waiting(split):
    return f"""{{
        .reg .pred other, early;
        .reg .b32 seen;
        setp.ne.u32 other, $2, 0;
        mov.b32 $0, 0;
        @other bra DONE;
        atom.add.acq_rel.gpu.global.u32 seen, [$1], 1;
        WAIT:
        ld.acquire.gpu.global.u32 seen, [$1];
        setp.lt.u32 early, seen, {split};
        @early bra WAIT;
        atom.add.relaxed.gpu.global.u32 $0, [$1], 1;
        DONE:
        }}"""


@gluon.jit
def _finish(total, scales, bias, y_ptr, row, output, m, n, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr):
    exists = output < n
    if GROUP == -1:
        place = output // 16 * 16 + output % 8 * 2 + output % 16 // 8
        total *= gl.load(scales + place, mask=exists, other=0.0).to(gl.float32)[None, :]
    if HAS_BIAS:
        total += gl.load(bias + output, mask=exists, other=0.0).to(gl.float32)[None, :]
    places = row[:, None].to(gl.int64) * n + output[None, :]
    gl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=(row < m)[:, None] & exists[None, :])
