"""Kernel layout: a layer's planes and scales as the Triton kernels read them. Made once, after loading; nothing else knows it.

A layer [N, K] is padded with zero weights to N' (a multiple of 64) and K' (of 128) and cut into units of 16 outputs and 128
columns, each of which one warp multiplies. A unit is 4 pieces of 32 columns. Of every piece, a lane of the warp holds the
16 codes that are its part of the left operand of two tensor core products of 16 columns (PTX ISA, m16n8k16, fragments of A):

    lane 4g + j, code (i, n), n = 4l + 2u + e:    output 8e + g of the unit, column 16i + 8u + 2j + l of the piece

which is the operand's own order, so that x needs none of its own. Codes are kept as sign and magnitude,
code ^ 128 from 128 on and ~code below: a sign, which is 1 for negative levels, and bits 6..0 of the distance from 0.

    name     dtype  shape                              word (lane, piece p), bits
    plane 0  int32  [N' / 16, K' / 128, 32, 4]    sign of (i, n) at 4n + 3 - 2i, bit 6 at 4n + 2 - 2i
    plane 1  int32  [N' / 16, K' / 128, 32, 2]    bit 5 at 4n + (q ^ 1) with q = 2 (p mod 2) + i: two pieces in a word
    plane 2  int32  [N' / 16, K' / 128, 32, 2]    bit 4 at 4n + q
    plane 3  int32  [N' / 16, K' / 128, 32, 4]    bits 3, 2 from 4n + 2 - 2i on
    plane 4  int32  [N' / 16, K' / 128, 32, 4]    bits 1, 0 from 4n + 2i on
    scales   bfloat16 or float32 [N' / 16, groups of K', 8, 2]: outputs g and 8 + g; one group for one scale per channel;
             padding has scale 0

A piece's word is at (lane, p) in planes 0, 3 and 4, and at (lane, p / 2) in planes 1 and 2.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.shapes import KERNEL_PLANE_WIDTHS as PLANE_WIDTHS
from matgptq_vllm.core.shapes import PAD_N, PIECE_K, PIECES, UNIT_K, UNIT_N, leading_planes, padded
from matgptq_vllm.core.shapes import kernel_plane_shapes as plane_shapes
from matgptq_vllm.core.shapes import kernel_scales_shape as scales_shape

__all__ = ["PAD_N", "PIECES", "PIECE_K", "PLANE_WIDTHS", "UNIT_K", "UNIT_N", "padded", "plane_shapes", "scales_shape"]

ROWS_AT_ONCE = 2048
"""Rows converted at a time: bounds the memory for temporaries."""


def num_planes(bits: int) -> int:
    """Smallest number of leading kernel planes that hold the top ``bits`` bits."""
    return leading_planes(PLANE_WIDTHS, bits)


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
        As many kernel planes as the given bits fill, and the scales.
    """
    n = planes[0].shape[0]
    bits = sum(layout.plane_widths[: len(planes)])
    # Of the last plane, some bits may not be given; they hold anything, as no width that is held reads them.
    count = num_planes(bits)
    result = [torch.zeros(shape, dtype=torch.int32, device=scales.device) for shape in plane_shapes(n, k)[:count]]
    write_kernel_planes(dict(enumerate(planes)), layout, k, dict(enumerate(result)))
    kernel_scales = scales.new_zeros(
        scales_shape(n, k, group_size), dtype=torch.bfloat16 if scales.dtype == torch.bfloat16 else torch.float32
    )
    units_n, groups = kernel_scales.shape[:2]
    by_output = scales.new_zeros(units_n * UNIT_N, groups)
    by_output[:n, : scales.shape[1]] = scales
    kernel_scales.copy_(by_output.view(units_n, 2, UNIT_N // 2, groups).permute(0, 3, 2, 1))
    return result, kernel_scales


def write_kernel_planes(
    planes: Mapping[int, torch.Tensor], layout: PlaneLayout, k: int, targets: Mapping[int, torch.Tensor]
) -> None:
    """Write kernel planes of a layer.

    Args:
        planes: plane of the checkpoint layout -> uint8 [N, packed K]: those that hold the bits of ``targets``, and plane 0:
            magnitudes depend on the sign.
        targets: kernel plane -> int32 tensor of its shape (``plane_shapes``), on the device of ``planes``; units of padding
            are left as they are.
    """
    n = next(iter(planes.values())).shape[0]
    for start in range(0, n, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, n))
        fields = _fields(layout.join([plane[rows] for plane in planes.values()], k, list(planes)))
        units = slice(start // UNIT_N, start // UNIT_N + fields.shape[0])
        for plane, target in targets.items():
            target[units] = _words(fields, plane)


def _fields(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [n, k] -> sign and magnitude, uint8 [units of n, units of k, piece, g, j, e, i, u, l]."""
    n, k = codes.shape
    bytes_ = torch.where(codes < 128, ~codes, codes ^ 128)
    bytes_ = torch.nn.functional.pad(bytes_, (0, padded(k, UNIT_K) - k, 0, padded(n, UNIT_N) - n))
    tiles = bytes_.view(padded(n, UNIT_N) // UNIT_N, 2, 8, padded(k, UNIT_K) // UNIT_K, PIECES, 2, 2, 4, 2)
    return tiles.permute(0, 3, 4, 2, 7, 1, 5, 6, 8).contiguous()


def _words(fields: torch.Tensor, plane: int) -> torch.Tensor:
    """Words of one plane, int32 [units of n, units of k, 32, 4 or 2]."""
    place: list[Callable[[int, int, int], tuple[int, int, int]]] = [
        lambda n, i, q: (4 * n + 2 - 2 * i, 6, 3),
        lambda n, i, q: (4 * n + (q ^ 1), 5, 1),
        lambda n, i, q: (4 * n + q, 4, 1),
        lambda n, i, q: (4 * n + 2 - 2 * i, 2, 3),
        lambda n, i, q: (4 * n + 2 * i, 0, 3),
    ]
    units_n, units_k = fields.shape[:2]
    single = PLANE_WIDTHS[plane] == 1
    # Pieces that share a word; their parts of it are put together below.
    pieces = fields.view(units_n, units_k, PIECES // 2, 2, *fields.shape[3:]) if single else fields.unsqueeze(3)
    words = torch.zeros((units_n, units_k, pieces.shape[2], 8, 4), dtype=torch.int32, device=fields.device)
    for parity in range(pieces.shape[3]):
        for code in range(16):
            i, u, lane_bit, e = code >> 3, code >> 2 & 1, code >> 1 & 1, code & 1
            n, q = 4 * lane_bit + 2 * u + e, 2 * parity + i
            field = pieces[:, :, :, parity, :, :, e, i, u, lane_bit].int()
            to, shift, mask = place[plane](n, i, q)
            words |= (field >> shift & mask) << to
    return words.flatten(3).transpose(2, 3)
