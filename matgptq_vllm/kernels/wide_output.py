"""From sums in registers to results in memory, for the wide product (kernels.wide)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels.lanes import factor
from matgptq_vllm.kernels.wide_layouts import WARPS, sums_layout


@gluon.jit
def write_tile(
    sums, scales, bias, y_ptr, places, tile, start, count, n,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """Store a tile whose sums are complete."""
    SUMS: gl.constexpr = sums_layout(WARPS, BLOCK_M)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    row = _rows_at(places, gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, OUT)), start, count, WIDTHS)
    for part in gl.static_range(TILES):
        first = (tile + part * WARPS) * 16
        output = first + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, SUMS))
        done = _finish(sums[part], scales, bias, output, n, RULE, GROUP, HAS_BIAS, True)
        done = gl.convert_layout(done.to(y_ptr.dtype.element_ty), OUT)
        to = first + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, OUT))
        gl.store(y_ptr + (row[None, :] * n + to[:, None]), done, mask=(row >= 0)[None, :] & (to < n)[:, None])


@gluon.jit
def leave_share(sums, share, count, BLOCK_M: gl.constexpr, TILES: gl.constexpr):
    """Store a program's sums for the others that share its tile: float32 [BLOCK_M, outputs]."""
    SUMS: gl.constexpr = sums_layout(WARPS, BLOCK_M)
    output = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, SUMS))
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SUMS))
    at = row[None, :] * (16 * WARPS * TILES) + output[:, None]
    mask = (row < count)[None, :] & (output >= 0)[:, None]
    for part in gl.static_range(TILES):
        gl.store(share + (at + part * 16 * WARPS), sums[part], mask=mask)


@gluon.jit
def add_shares(
    shares, scales, bias, y_ptr, places, tile, split, start, count, n,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Every program adds up and stores its part of a tile whose shares are all there, in the order of K."""
    BLOCK_N: gl.constexpr = 16 * WARPS * TILES
    SIZE: gl.constexpr = BLOCK_M * BLOCK_N
    CHUNK: gl.constexpr = 128 * WARPS
    place = gl.arange(0, CHUNK, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    end = gl.minimum(count, BLOCK_M) * BLOCK_N
    for chunk in range(split * CHUNK, end, SPLIT * CHUNK):
        at = chunk + place
        total = gl.load(shares + at, mask=at < end, other=0.0, cache_modifier=".cg")
        for share in gl.static_range(1, SPLIT):
            total += gl.load(shares + (share * SIZE + at), mask=at < end, other=0.0, cache_modifier=".cg")
        output = tile * 16 + at % BLOCK_N
        done = _finish(total, scales, bias, output, n, RULE, GROUP, HAS_BIAS, False)
        row = _rows_at(places, at // BLOCK_N, start, count, WIDTHS)
        mask = (row >= 0) & (output < n) & (at < end)
        gl.store(y_ptr + (row * n + output), done.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _rows_at(places, place, start, count, WIDTHS: gl.constexpr):
    """Rows at places of the row tile that begins at ``start``, -1 for none."""
    row = start + place
    if len(WIDTHS) > 1:
        row = gl.load(places + row, mask=place < count, other=-1)
    return gl.where(place < count, row, -1)


@gluon.jit
def _finish(
    sums, scales, bias, output, n, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, EXPAND: gl.constexpr
):
    """Sums times what weights were left in units of, plus the bias. With EXPAND, sums are [outputs, rows]."""
    sums *= factor(RULE)
    exists = output < n
    if GROUP == -1:
        place = output // 16 * 16 + output % 8 * 2 + output % 16 // 8
        scale = gl.load(scales + place, mask=exists, other=0.0).to(gl.float32)
        sums *= scale[:, None] if EXPAND else scale
    if HAS_BIAS:
        addend = gl.load(bias + output, mask=exists, other=0.0).to(gl.float32)
        sums += addend[:, None] if EXPAND else addend
    return sums
