"""The product for some tens to hundreds of rows: y = x @ W.T with Hopper's asynchronous tensor core products (wgmma).

A program computes 128 or 256 outputs for a row tile of one width. Its warpgroups have roles. One brings words of the planes and
x to shared memory, some units of K ahead (kernels.wide_ring), and two multiply, each its own outputs: a warp makes weights of
16 outputs from words in registers, scaled, in the order in which they are the left operand of the product with x
(kernels.wide_weights), while the tensor cores work at the product before. Stages of shared memory go from one role to the
other by mbarriers, so that the two that multiply need not keep step.

The layout of planes (kernels.layout) is that of the products for fewer rows: a warp's part of the left operand is the same
for both kinds of tensor core products. Rows of a mixed batch have been arranged (kernels.arrange). Widths are looked up on the
device: row tiles have rows of one width each (kernels.wide_rows), and there are as many programs as row tiles of a batch of
one width; they take further row tiles of a mixed batch in turns. Or they have equal shares of all tiles (kernels.wide_stream).

Written in Gluon, Triton's language of explicit layouts, because registers and shared memory have to be laid out as said.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.arrange import Arranged
from matgptq_vllm.kernels.gluon_names import barrier, wait_for_others
from matgptq_vllm.kernels.lanes import bits_needed
from matgptq_vllm.kernels.launch import Launcher, power_of_two
from matgptq_vllm.kernels.layout import PLANE_WIDTHS, UNIT_N
from matgptq_vllm.kernels.wide_config import GROUPS, REGISTERS, WideConfig
from matgptq_vllm.kernels.wide_layouts import WARPS
from matgptq_vllm.kernels.wide_output import add_shares, leave_share, write_tile
from matgptq_vllm.kernels.wide_ptx import WideCode
from matgptq_vllm.kernels.wide_ring import bring, new_ring
from matgptq_vllm.kernels.wide_rows import count_rows, row_tile_of
from matgptq_vllm.kernels.wide_stream import bring_range, consume_range
from matgptq_vllm.kernels.wide_sums import in_common_units, no_sums, tile_sums

_GROUPS = gl.constexpr(GROUPS)


@triton.constexpr_function
def _sizes(widths, block_m):
    """Rows that the tensor cores may work at: a mixed batch leaves many tiles half empty."""
    return (block_m // 2, block_m) if len(widths) > 1 and block_m >= 128 else (block_m,)


@gluon.jit
def _consume(
    xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, places, rows_of_widths, tile, last_tile, split, row_tile,
    row_step, first_lock, first, last, n, units_k,
    PART: gl.constexpr, WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr,
    SPLIT: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Multiply a warpgroup's tile of outputs with one row tile after the other, and store or share the sums."""
    SIZES: gl.constexpr = _sizes(WIDTHS, BLOCK_M)
    tile += PART * TILES * WARPS
    at = (0, 0, 0, 0)
    width, count = row_tile_of(rows_of_widths, row_tile, WIDTHS, BLOCK_M)
    while width != 0:
        for index in gl.static_range(len(SIZES)):
            if (count <= SIZES[index]) & (count > (SIZES[index - 1] if index else 0)):
                at = _row_tile(
                    xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, places, tile, last_tile, split, row_tile,
                    first_lock, first, last, n, units_k, width, count, at,
                    PART, WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, BLOCK_M, SIZES[index], TILES, STAGES, HALVES, PDL, CODE,
                )  # fmt: skip
        row_tile += row_step
        width, count = row_tile_of(rows_of_widths, row_tile, WIDTHS, BLOCK_M)


@gluon.jit
def _row_tile(
    xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, places, tile, last_tile, split, row_tile, first_lock, first,
    last, n, units_k, width, count, at,
    PART: gl.constexpr, WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr,
    SPLIT: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Multiply the first ROWS rows of a row tile; the next stages."""
    sums = no_sums(ROWS, TILES)
    for index in gl.static_range(len(WIDTHS)):
        if width == WIDTHS[index]:
            sums, at = tile_sums(
                sums, xs, ring, full, empty, scales, tile, last_tile, first, last, units_k, at, y_ptr.dtype.element_ty,
                PART, WIDTHS[index], RULE, GROUP, ROWS, TILES, STAGES, HALVES, CODE,
            )  # fmt: skip
            sums = in_common_units(sums, WIDTHS[index], RULE, TILES, CODE)
    if PDL:
        # The kernel before this one may still write or read what is written here.
        wait_for_others()
    start = row_tile * BLOCK_M
    if SPLIT == 1:
        write_tile(sums, scales, bias, y_ptr, places, tile, start, count, n, WIDTHS, RULE, GROUP, HAS_BIAS, ROWS, TILES)
    else:
        SIZE: gl.constexpr = BLOCK_M * 16 * WARPS * TILES
        number = (first_lock + row_tile) * _GROUPS + PART
        shares = workspace + number.to(gl.int64) * (SPLIT * SIZE)
        leave_share(sums, shares + split * (ROWS * 16 * WARPS * TILES), count, ROWS, TILES)
        barrier()
        # Programs that share a tile are started one after the other, so that all of them run.
        lock = locks + number
        arrived = gl.atomic_add(lock, 1, sem="acq_rel") + 1
        while arrived < SPLIT:
            arrived = gl.atomic_add(lock, 0, sem="acquire")
        add_shares(
            shares, scales, bias, y_ptr, places, tile, split, start, count, n, WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, ROWS,
            TILES,
        )  # fmt: skip
        if gl.atomic_add(lock, 1, sem="acq_rel") == 2 * SPLIT - 1:
            gl.store(lock, 0)
    return at


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that wait for so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@triton.constexpr_function
def _widest(widths):
    return widths[-1]


@gluon.jit(do_not_specialize=["m", "units_k", "rows"])
def _wide_kernel(
    x_desc, token_profiles, profile_widths, plane0, plane1, plane2, plane3, plane4, scales, bias, y_ptr, workspace, locks,
    places, m, n, units_n, units_k, rows,
    WIDTHS: gl.constexpr, RULE: gl.constexpr, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr,
    STREAM: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    HALVES: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Grid: (SPLIT, tiles of outputs, row tiles), programs that share a tile side by side; with STREAM just programs."""
    BITS: gl.constexpr = bits_needed(_widest(WIDTHS), RULE)
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    split, tile_n, row_tile = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    # Step data are older than any kernel that may still run.
    rows_of_widths = count_rows(token_profiles, profile_widths, m, WIDTHS, ROWS)
    first, last = split * units_k // SPLIT, (split + 1) * units_k // SPLIT
    tile, last_tile = tile_n * (WARPS * TILES * _GROUPS), units_n - 1
    row_step = gl.num_programs(2)
    first_lock = tile_n * (rows // BLOCK_M)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, 64], DTYPE)
    xs = gl.allocate_shared_memory(DTYPE, [HALVES, BLOCK_M, 64], SHARED)
    ring = new_ring(BITS, STAGES, TILES * _GROUPS)
    # Each thread that copies words says so when its are there; one announces the bytes of x. With as much room for x as for
    # words, both come by the same barriers.
    if HALVES == 2 * STAGES:
        full = (_barriers(STAGES, 32 * WARPS + 1),)
        empty = (_barriers(STAGES, _GROUPS),)
    else:
        full = (_barriers(STAGES, 32 * WARPS), _barriers(HALVES, 1))
        empty = (_barriers(STAGES, _GROUPS), _barriers(HALVES, _GROUPS))
    fence_async_shared()
    barrier()
    # Two warpgroups multiply, each a tile of its own, and one more brings what they need.
    if STREAM:
        row_tiles = rows // BLOCK_M
        tiles = (units_n + WARPS * TILES * _GROUPS - 1) // (WARPS * TILES * _GROUPS) * row_tiles
        gl.warp_specialize(
            [
                (
                    consume_range,
                    (
                        xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, m, tiles, row_tiles, last_tile, n,
                        units_k, gl.constexpr(0), WIDTHS, RULE, GROUP, HAS_BIAS, BLOCK_M, TILES, STAGES, HALVES, PDL, CODE,
                    ),
                ),
                (
                    consume_range,
                    (
                        xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, m, tiles, row_tiles, last_tile, n,
                        units_k, gl.constexpr(1), WIDTHS, RULE, GROUP, HAS_BIAS, BLOCK_M, TILES, STAGES, HALVES, PDL, CODE,
                    ),
                ),
                (
                    bring_range,
                    (
                        xs, ring, full, empty, x_desc, plane0, plane1, plane2, plane3, plane4, tiles, row_tiles, last_tile,
                        units_k, WIDTHS, RULE, BLOCK_M, TILES * _GROUPS, STAGES, HALVES, PDL,
                    ),
                ),
            ],
            [WARPS] * 2,
            REGISTERS,
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, places, rows_of_widths, tile, last_tile,
                        split, row_tile, row_step, first_lock, first, last, n, units_k,
                        gl.constexpr(0), WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, BLOCK_M, TILES, STAGES, HALVES, PDL, CODE,
                    ),
                ),
                (
                    _consume,
                    (
                        xs, ring, full, empty, scales, bias, y_ptr, workspace, locks, places, rows_of_widths, tile, last_tile,
                        split, row_tile, row_step, first_lock, first, last, n, units_k,
                        gl.constexpr(1), WIDTHS, RULE, GROUP, HAS_BIAS, SPLIT, BLOCK_M, TILES, STAGES, HALVES, PDL, CODE,
                    ),
                ),
                (
                    bring,
                    (
                        xs, ring, full, empty, x_desc, plane0, plane1, plane2, plane3, plane4, rows_of_widths, tile, last_tile,
                        row_tile, row_step, first, last, units_k, WIDTHS, RULE, BLOCK_M, TILES * _GROUPS, STAGES, HALVES, PDL,
                    ),
                ),
            ],
            [WARPS] * 2,
            REGISTERS,
        )  # fmt: skip


_multiplying = Launcher(_wide_kernel)


@lru_cache(maxsize=16)
def _layout_of_x(block_m: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of half a unit of a row tile in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([block_m, 64], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def wide_gemm(
    arranged: Arranged,
    y: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    config: WideConfig,
    locks: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill ``y`` with x @ W.T + bias, where row m of x meets the weights read at profile_widths[token_profiles[m]] bits.

    Args:
        arranged: x, of ``arrange.arrange`` with the same ``config.block_m``, profiles and ``widths``, or with one width of
            ``arrange.as_it_is``; bfloat16 or float16, on a Hopper GPU.
        y: [M, N], dtype of x.
        planes, scales, token_profiles, profile_widths, locks: as for ``gemm.sliced_gemm``.
        widths: every width that a row may have, ascending.
        bias: [N], any floating type.

    Returns:
        ``y``.
    """
    m, n = y.shape
    units_n, units_k = scales.shape[0], planes[0].shape[1]
    rows = arranged.places
    split = min(config.split_k, units_k)
    row_tiles = rows // config.block_m
    # A batch of one width has this many row tiles; programs take those of more widths in turns.
    programs_m = -(-m // config.block_m)
    block_n = config.block_n
    tiles_n = -(-units_n * UNIT_N // block_n)
    workspace, grid = y, (split, tiles_n, programs_m)
    stream = config.programs > 0
    if stream:
        # Two programs at most share a tile.
        grid = (min(config.programs, tiles_n * row_tiles, len(locks) // GROUPS), 1, 1)
        workspace = y.new_empty((grid[0], config.block_m, block_n), dtype=torch.float32)
    elif split > 1:
        workspace = y.new_empty((tiles_n * row_tiles, split, config.block_m, block_n), dtype=torch.float32)
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    x = TensorDescriptor.from_tensor(arranged.x, [config.block_m, 64], _layout_of_x(config.block_m, y.dtype))
    _multiplying.launch(
        (y.dtype, scales.dtype, None if bias is None else bias.dtype, y.device, n, units_n),
        grid,
        (
            x, token_profiles, profile_widths, *given, scales, y if bias is None else bias, y, workspace, locks,
            token_profiles if arranged.row_places is None else arranged.row_places, m, n, units_n, units_k, rows,
        ),
        {
            "WIDTHS": tuple(widths), "RULE": rule, "GROUP": group_size, "HAS_BIAS": bias is not None,
            "SPLIT": 1 if stream else split, "STREAM": stream, "ROWS": max(power_of_two(m), 128) if len(widths) > 1 else 1,
            "BLOCK_M": config.block_m, "TILES": config.tiles, "STAGES": config.stages, "HALVES": config.halves,
            "REGISTERS": REGISTERS, "PDL": config.pdl, "CODE": WideCode.of(y.dtype),
        },
        num_warps=4, launch_pdl=config.pdl,
    )  # fmt: skip
    return y
