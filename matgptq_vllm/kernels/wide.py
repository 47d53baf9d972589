"""The product for some tens to hundreds of rows: y = x @ W.T with Hopper's asynchronous tensor core products (wgmma).

A program computes 128 or 256 outputs for a row tile of one width. Its warpgroups have roles. One brings words of the planes and
x to shared memory, some units of K ahead (kernels.wide_ring), and two multiply, each its own outputs: a warp makes weights of
16 outputs from words in registers, scaled, in the order in which they are the left operand of the product with x
(kernels.wide_weights), while the tensor cores work at the product before. Stages of shared memory go from one role to the
other by mbarriers, so that the two that multiply need not keep step.

The layout of planes (kernels.layout) is that of the products for fewer rows: a warp's part of the left operand is the same
for both kinds of tensor core products. x has been arranged for it (kernels.arrange). Widths are looked up on the device: row
tiles have rows of one width each (kernels.wide_rows), and there are as many programs as row tiles of a batch of one width;
they take further row tiles of a mixed batch in turns.

Written in Gluon, Triton's language of explicit layouts, because registers and shared memory have to be laid out as said.
"""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.arrange import Arranged
from matgptq_vllm.kernels.gemm import with_slot
from matgptq_vllm.kernels.gluon_names import barrier, wait_for_others
from matgptq_vllm.kernels.lanes import bits_needed
from matgptq_vllm.kernels.launch import Launcher, power_of_two
from matgptq_vllm.kernels.layout import PLANE_WIDTHS, UNIT_N
from matgptq_vllm.kernels.wide_config import GROUPS, REGISTERS, WideConfig
from matgptq_vllm.kernels.wide_layouts import WARPS, sums_layout
from matgptq_vllm.kernels.wide_output import add_shares, leave_share, write_tile
from matgptq_vllm.kernels.wide_ptx import WideCode
from matgptq_vllm.kernels.wide_ring import bring, new_ring, next_stage
from matgptq_vllm.kernels.wide_rows import count_rows, row_tile_of
from matgptq_vllm.kernels.wide_weights import half_weights, tiles_scales, unit_words

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
    SUMS: gl.constexpr = sums_layout(WARPS, ROWS)
    sums = ()
    for _ in gl.static_range(TILES):
        sums = sums + (gl.zeros([16 * WARPS, ROWS], gl.float32, SUMS),)
    for index in gl.static_range(len(WIDTHS)):
        if width == WIDTHS[index]:
            sums, at = _tile_sums(
                sums, xs, ring, full, empty, scales, tile, last_tile, first, last, units_k, at, y_ptr.dtype.element_ty,
                PART, WIDTHS[index], RULE, GROUP, ROWS, TILES, STAGES, HALVES, CODE,
            )  # fmt: skip
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
def _tile_sums(
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
    ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    REGISTERS: gl.constexpr, PDL: gl.constexpr, CODE: gl.constexpr,
):  # fmt: skip
    """Grid: (SPLIT, tiles of outputs, row tiles), programs that share a tile side by side."""
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
    workspace = y
    if split > 1:
        workspace = y.new_empty((tiles_n * row_tiles, split, config.block_m, block_n), dtype=torch.float32)
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    x = TensorDescriptor.from_tensor(arranged.x, [config.block_m, 64], _layout_of_x(config.block_m, y.dtype))
    _multiplying.launch(
        (y.dtype, scales.dtype, None if bias is None else bias.dtype, y.device, n, units_n),
        (split, tiles_n, programs_m),
        (
            x, token_profiles, profile_widths, *given, scales, y if bias is None else bias, y, workspace, locks,
            token_profiles if arranged.row_places is None else arranged.row_places, m, n, units_n, units_k, rows,
        ),
        {
            "WIDTHS": tuple(widths), "RULE": rule, "GROUP": group_size, "HAS_BIAS": bias is not None, "SPLIT": split,
            "ROWS": max(power_of_two(m), 128) if len(widths) > 1 else 1, "BLOCK_M": config.block_m,
            "TILES": config.tiles, "STAGES": config.stages, "HALVES": config.halves, "REGISTERS": REGISTERS, "PDL": config.pdl,
            "CODE": WideCode.of(y.dtype),
        },
        num_warps=4, launch_pdl=config.pdl,
    )  # fmt: skip
    return y
