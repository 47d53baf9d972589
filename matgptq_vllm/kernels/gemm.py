"""The fused matrix product: y = x @ W.T, each row at its own width, reading only the planes of the widest row present.

A program computes a tile of BLOCK_N outputs for BLOCK_M rows, over its share of K. Weights are the left operand of the
tensor cores, because they come from registers; so everything is transposed: y.T = W @ x.T. Which widths the rows of a
program have is read on the device; for each of them the loop made for it runs over the program's share, the widest first, and
leaves the rows of its width. The planes come from memory once: a share is small enough to stay in the cache.

A row's result does not depend on the other rows: the loop of its width does the same for it whatever else runs. It does
depend on the configuration, of which one is chosen per range of M (kernels.tuning).
"""

# Triton has no unpacking inside a tuple.
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS, MIN_BLOCK_M, MIN_BLOCK_N, Config
from matgptq_vllm.kernels.lanes import bits_needed, factor, load_words, weights
from matgptq_vllm.kernels.lanes_ptx import LaneCode
from matgptq_vllm.kernels.layout import BLOCK_K, PAD_N, PLANE_WIDTHS, padded


@triton.jit
def _accumulate(
    x_ptr, plane0, plane1, plane2, plane3, plane4, scales,
    rows, row_mask, columns, first, last, n_padded, k, stride_x,
    WIDTH: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """W @ x.T over steps first..last of K, W read at WIDTH: float32 [BLOCK_N, BLOCK_M]. A step is HALVES halves of a block."""
    BITS: tl.constexpr = bits_needed(WIDTH, RULE)
    tile_k = tl.arange(0, 32)
    offsets = columns[:, None] * 32 + tile_k[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Tiles of 32 columns that share a scale; a scale per channel is applied once, at the end.
    TILES: tl.constexpr = 4 if GROUP == -1 else GROUP // 32
    group_k = tl.arange(0, 32 * TILES)
    x_tile = x_ptr + rows[None, :].to(tl.int64) * stride_x + group_k[:, None]
    GROUPS: tl.constexpr = HALVES * (8 // TILES)
    scale_ptr = scales + columns
    ahead = _load_scales(scale_ptr, first * GROUPS, n_padded, GROUP, GROUPS, BLOCK_N)
    for step in tl.range(first, last, num_stages=STAGES):
        # Scales are read a step ahead: unlike the planes, they do not pass through the pipeline. The last step reads its own
        # once more.
        group_scales = ahead
        ahead = _load_scales(scale_ptr, tl.minimum(step + 1, last - 1) * GROUPS, n_padded, GROUP, GROUPS, BLOCK_N)
        for index in tl.static_range(HALVES):
            half_block = step * HALVES + index
            pair = half_block * n_padded * 32 + offsets
            single = step * HALVES // 2 * n_padded * 32 + offsets
            words = (load_words(plane0, pair, CODE),)
            if BITS >= 3:
                words = words + (_of_half(load_words(plane1, single, CODE), half_block, HALVES),)
            if BITS >= 4:
                words = words + (_of_half(load_words(plane2, single, CODE), half_block, HALVES),)
            if BITS >= 6:
                words = words + (load_words(plane3, pair, CODE),)
            if BITS >= 8:
                words = words + (load_words(plane4, pair, CODE),)
            tiles = weights(words, WIDTH, index, RULE, DTYPE, CODE)
            for group in tl.static_range(8 // TILES):
                x = _load_x(x_tile, (half_block * 8 + group * TILES) * 32, row_mask, group_k, k, EVEN_K)
                weight = _side_by_side(tiles, group * TILES, TILES, BLOCK_N)
                if CODE is None:
                    # Triton's interpreter multiplies bfloat16 as integers.
                    part = tl.dot(weight.to(tl.float32), x.to(tl.float32), input_precision="ieee")
                else:
                    part = tl.dot(weight, x)
                total += part * (group_scales[index * (8 // TILES) + group].to(tl.float32) * factor(WIDTH, RULE, CODE))[:, None]
    return total


@triton.jit
def _side_by_side(tiles, START: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """TILES adjacent tiles as one, [BLOCK_N, 32 * TILES]: one product with a long K costs less than several."""
    if TILES == 1:
        result = tiles[START]
    elif TILES == 2:
        result = tl.join(tiles[START], tiles[START + 1]).permute(0, 2, 1).reshape(BLOCK_N, 64)
    else:
        lower, upper = tl.join(tiles[START], tiles[START + 1]), tl.join(tiles[START + 2], tiles[START + 3])
        result = tl.join(lower, upper).permute(0, 3, 2, 1).reshape(BLOCK_N, 128)
    return result


@triton.jit
def _load_scales(scale_ptr, group, n_padded, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scales of GROUPS groups from ``group`` on, each [BLOCK_N]; ones if there is one scale per channel."""
    result = ()
    for index in tl.static_range(GROUPS):
        if GROUP == -1:
            result = result + (tl.full((BLOCK_N,), 1.0, tl.float32),)
        else:
            result = result + (tl.load(scale_ptr + (group + index) * n_padded),)
    return result


@triton.jit
def _of_half(words, half_block, HALVES: tl.constexpr):
    """Words of a one-bit plane such that the bits of this half block lie where half 0 has them."""
    if HALVES == 1:
        words = words >> (half_block % 2).to(words.dtype)
    return words


@triton.jit
def _load_x(x_tile, start, row_mask, group_k, k, EVEN_K: tl.constexpr):
    """x.T, [columns of a group, BLOCK_M]; 0 outside."""
    if EVEN_K:
        x = tl.load(x_tile + start, mask=row_mask[None, :], other=0.0)
    else:
        x = tl.load(x_tile + start, mask=row_mask[None, :] & ((start + group_k) < k)[:, None], other=0.0)
    return x


@triton.jit(do_not_specialize=["m", "blocks"])
def _gemm_kernel(
    x_ptr, plane0, plane1, plane2, plane3, plane4, scales, bias, y_ptr, workspace, locks,
    token_profiles, profile_widths, row_order, done_width,
    m, n, n_padded, k, blocks, stride_x,
    WIDTHS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    ORDERED: tl.constexpr, SOME_DONE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, HALVES: tl.constexpr, PDL: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles * column tiles, SPLIT), row tiles fastest, so that those that read the same planes run together."""
    row_tiles = tl.cdiv(m, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    column_tile = tl.program_id(0) // row_tiles
    split = tl.program_id(1)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * blocks // SPLIT * (2 // HALVES)
    last = (split + 1) * blocks // SPLIT * (2 // HALVES)
    if PDL:
        # The kernel may have been started before the one before it ended. What is read until the wait must be older than
        # that one: weights always are, and the step's row data are written ahead of all layers.
        gdc_launch_dependents()
    if ORDERED:
        rows = tl.load(row_order + rows, mask=row_mask, other=0)
        # Whatever the order holds, nothing outside of x and y is touched.
        row_mask = row_mask & (rows < m)
    if len(WIDTHS) == 1:
        if PDL:
            gdc_wait()
        total = _accumulate(
            x_ptr, plane0, plane1, plane2, plane3, plane4, scales, rows, row_mask, columns, first, last, n_padded, k, stride_x,
            WIDTHS[0], RULE, GROUP, EVEN_K, BLOCK_M, BLOCK_N, STAGES, HALVES, DTYPE, CODE,
        )  # fmt: skip
    else:
        profiles = tl.load(token_profiles + rows, mask=row_mask, other=0)
        row_widths = tl.load(profile_widths + profiles, mask=row_mask, other=0)
        if PDL:
            gdc_wait()
        if SOME_DONE:
            # Those rows have no width here, so nothing is computed for them.
            row_mask = row_mask & (row_widths != tl.load(done_width))
            row_widths = tl.where(row_mask, row_widths, 0)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # The widest first: what narrower ones read again is then in the cache.
        for index in tl.static_range(len(WIDTHS) - 1, -1, -1):
            if tl.max((row_widths == WIDTHS[index]).to(tl.int32), 0) > 0:
                of_width = _accumulate(
                    x_ptr, plane0, plane1, plane2, plane3, plane4, scales, rows, row_mask, columns, first, last, n_padded, k,
                    stride_x, WIDTHS[index], RULE, GROUP, EVEN_K, BLOCK_M, BLOCK_N, STAGES, HALVES, DTYPE, CODE,
                )  # fmt: skip
                total = tl.where((row_widths == WIDTHS[index])[None, :], of_width, total)
    out = rows[None, :].to(tl.int64) * n + columns[:, None]
    out_mask = row_mask[None, :] & (columns < n)[:, None]
    if SPLIT > 1:
        # Every program leaves its sum; the last one to arrive adds them, always in the order of K.
        place = rows[None, :].to(tl.int64) * n_padded + columns[:, None]
        share = m.to(tl.int64) * n_padded
        tl.store(workspace + split * share + place, total, mask=row_mask[None, :])
        tl.debug_barrier()
        arrived = tl.atomic_add(locks + tl.program_id(0), 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLIT):
                total += tl.load(workspace + other * share + place, mask=row_mask[None, :], cache_modifier=".cg")
            tl.store(locks + tl.program_id(0), 0)
            _finish(total, scales, bias, y_ptr, columns, out, out_mask, n, GROUP, HAS_BIAS)
    else:
        _finish(total, scales, bias, y_ptr, columns, out, out_mask, n, GROUP, HAS_BIAS)


@triton.jit
def _finish(total, scales, bias, y_ptr, columns, out, out_mask, n, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr):
    if GROUP == -1:
        total *= tl.load(scales + columns).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + out, total.to(y_ptr.dtype.element_ty), mask=out_mask)


def sliced_gemm(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    config: Config,
    locks: torch.Tensor,
    row_order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    done: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x @ W.T + bias, where row m of x meets the weights read at profile_widths[token_profiles[m]] bits.

    Args:
        x: bfloat16 or float16 [M, K] on a GPU (any floating type in Triton's interpreter); rows may be strided.
        planes: leading kernel planes (kernels.layout), enough for the widest of ``widths``.
        scales: floating, kernel layout.
        n: outputs.
        token_profiles: int32 [at least M].
        profile_widths: int32 [number of profiles].
        widths: every width that ``profile_widths`` may hold, ascending. With one, nothing is looked up.
        locks: int32, at least ``num_locks(...)``, all 0; they are 0 again afterwards. Products that may overlap in time must
            not share them.
        row_order: int32 [at least M]: a permutation of 0..M-1 that brings rows of one width together. It changes speed only.
        bias: [N], any floating type.
        done: a width, int32 with one element on the device, and the result [M, N], in which the rows of that width are
            there already; the others are filled in. Only with several ``widths``.

    Returns:
        [M, N], dtype of x.
    """
    m, k = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = x.new_empty(m, n) if done is None else done[1]
    n_padded = scales.shape[1]
    blocks = planes[0].shape[0]
    split = min(config.split_k, blocks)
    workspace = x.new_empty((split, m, n_padded), dtype=torch.float32) if split > 1 else y
    given = [*planes, *[planes[0]] * (len(PLANE_WIDTHS) - len(planes))]
    code = lane_code(x)
    pdl = config.pdl and code is not None
    grid = (triton.cdiv(m, config.block_m) * (n_padded // config.block_n), split)
    _gemm_kernel[grid](
        x, *given, scales, y if bias is None else bias, y, workspace, locks, token_profiles, profile_widths,
        token_profiles if row_order is None else row_order, token_profiles if done is None else done[0],
        m, n, n_padded, k, blocks, x.stride(0),
        WIDTHS=tuple(widths), RULE=rule, GROUP=group_size, EVEN_K=k % BLOCK_K == 0, HAS_BIAS=bias is not None,
        ORDERED=row_order is not None and m > config.block_m, SOME_DONE=done is not None, SPLIT=split, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.num_stages, HALVES=config.step // (BLOCK_K // 2), PDL=pdl, CODE=code,
        num_warps=config.num_warps, maxnreg=config.max_registers, launch_pdl=pdl,
    )  # fmt: skip
    return y


def lane_code(x: torch.Tensor) -> LaneCode | None:
    """The assembly for products with ``x``; None where only plain Triton runs."""
    if x.device.type != "cuda" or torch.version.cuda is None:
        return None
    return LaneCode("bf16" if x.dtype == torch.bfloat16 else "f16")


def num_locks(n: int) -> int:
    """Locks that a layer with ``n`` outputs needs."""
    return padded(n, PAD_N) // MIN_BLOCK_N * MAX_SPLIT_ROWS // MIN_BLOCK_M
