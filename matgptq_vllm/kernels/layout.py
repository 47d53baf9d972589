"""Kernel layout: a layer's planes and scales as the Triton kernels read them. Made once, after loading; nothing else knows it.

A layer [N, K] is padded with zero codes to N' (a multiple of 128) and K' (of 512). A block of 512 columns is 16 tiles of
32, in two halves. The codes of a pair of columns (2c, 2c + 1) of all tiles lie in the same 32-bit words, at (block, row, c),
because tensor cores take such pairs together: shifting a word turns one tile into the next, and no code crosses a thread.

    name     dtype  shape                       word (block b, half h, row n, pair c), byte 2 * (f / 4) + (column is odd)
    plane 0  int16  [K' / 512, 2, N', 32]       bits 2p, 2p + 1: bits 6, 7 of the code in tile 8h + f
    plane 1  int16  [K' / 512, N', 32]          bit 2p + h: bit 5 of the code in tile 8h + f
    plane 2  int16  [K' / 512, N', 32]          bit 2p + h: bit 4
    plane 3  int16  [K' / 512, 2, N', 32]       bits 2p, 2p + 1: bits 2, 3
    plane 4  int16  [K' / 512, 2, N', 32]       bits 2p, 2p + 1: bits 0, 1
    scales   any    [groups of K', N'], or [1, N'] for one scale per channel; padding has scale 0

f = 0..7 is a field and p = f mod 4. A row of a block is 64 bytes of a plane, and rows follow each other, so tiles of rows
are contiguous. Tensors are int16 because tiles of weights have as many elements.
"""

from collections.abc import Sequence

import torch

from matgptq_vllm.core.planes import PlaneLayout

PLANE_WIDTHS = (2, 1, 1, 2, 2)
"""Bits per plane of the kernel layout, whatever the checkpoint's."""

TILE_K = 32
BLOCK_K = 16 * TILE_K
"""Columns per block: a bit of a 1-bit plane for every tile in 16 bits."""

PAD_N = 128

ROWS_AT_ONCE = 4096
"""Rows converted at a time: bounds the memory for temporaries."""


def num_planes(bits: int) -> int:
    """Smallest number of leading kernel planes that hold the top ``bits`` bits."""
    return next(count for count in range(1, len(PLANE_WIDTHS) + 1) if sum(PLANE_WIDTHS[:count]) >= bits)


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def plane_shapes(n: int, k: int) -> list[tuple[int, ...]]:
    """Shapes of all planes of a layer with ``n`` outputs and ``k`` inputs; they are int16."""
    blocks, n_padded = padded(k, BLOCK_K) // BLOCK_K, padded(n, PAD_N)
    return [(blocks, 2, n_padded, TILE_K) if width == 2 else (blocks, n_padded, TILE_K) for width in PLANE_WIDTHS]


def to_kernel_layout(
    planes: Sequence[torch.Tensor], scales: torch.Tensor, layout: PlaneLayout, k: int, group_size: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Planes and scales of a layer in the kernel layout, on their device.

    Args:
        planes: leading planes of the checkpoint layout, each uint8 [N, packed K].
        scales: floating [N, groups].
        layout: of ``planes``.
        k: inputs of the layer.

    Returns:
        As many kernel planes as the given bits fill, and the scales, same dtype.
    """
    n = planes[0].shape[0]
    bits = sum(layout.plane_widths[: len(planes)])
    # Of the last plane, some bits may not be given; they stay 0 and no width that is held reads them.
    count = num_planes(bits)
    n_padded, blocks = padded(n, PAD_N), padded(k, BLOCK_K) // BLOCK_K
    result = [torch.zeros(shape, dtype=torch.int16, device=scales.device) for shape in plane_shapes(n, k)[:count]]
    for start in range(0, n, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, n))
        codes = layout.join([plane[rows] for plane in planes], k)
        for plane, target in enumerate(result):
            target[..., rows, :] = _words(codes, plane, blocks)
    return result, _kernel_scales(scales, n_padded, blocks, group_size)


def _words(codes: torch.Tensor, plane: int, blocks: int) -> torch.Tensor:
    """uint8 [n, k] -> int16 [blocks, 2, n, 32] (plane of two bits) or [blocks, n, 32]."""
    n, k = codes.shape
    width = PLANE_WIDTHS[plane]
    bits = (codes >> (8 - sum(PLANE_WIDTHS[: plane + 1]))) & ((1 << width) - 1)
    # n, block, half, upper half of the fields, place, pair, odd column
    bits = torch.nn.functional.pad(bits, (0, blocks * BLOCK_K - k)).view(n, blocks, 2, 2, 4, TILE_K // 2, 2)
    lanes = torch.zeros((n, blocks, 2, 2, TILE_K // 2, 2), dtype=torch.uint8, device=codes.device)
    for place in range(4):
        lanes |= bits[:, :, :, :, place] << (2 * place)
    if width == 1:
        lanes = (lanes[:, :, :1] | (lanes[:, :, 1:] << 1)).contiguous()
    # A pair's four bytes: both columns of the lower fields, then both of the upper.
    words = lanes.permute(1, 2, 0, 4, 3, 5).contiguous().view(torch.int16).flatten(3)
    return words if width == 2 else words[:, 0]


def _kernel_scales(scales: torch.Tensor, n_padded: int, blocks: int, group_size: int) -> torch.Tensor:
    n, groups = scales.shape
    rows = 1 if group_size == -1 else blocks * BLOCK_K // group_size
    result = scales.new_zeros(rows, n_padded)
    result[:groups, :n] = scales.T
    return result
