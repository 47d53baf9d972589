"""kernels.layout: where every bit of a code lies, and that planes come apart and go together."""

import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import num_groups
from matgptq_vllm.kernels.layout import BLOCK_K, PAD_N, PLANE_WIDTHS, num_planes, padded, to_kernel_layout

LAYOUT = PlaneLayout()


def random_layer(n: int, k: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(n, num_groups(k, group_size), generator=generator).bfloat16() + 0.5


def bit_of(words: torch.Tensor, plane: int, row: int, column: int, bit: int) -> int:
    """Bit ``bit`` of the field of plane ``plane`` of one code, looked up as the module's table says."""
    block, within = divmod(column, BLOCK_K)
    tile, column_of_tile = divmod(within, 32)
    half, field = divmod(tile, 8)
    upper, place = divmod(field, 4)
    pair, odd = divmod(column_of_tile, 2)
    row_of_words = words[block, half, row] if PLANE_WIDTHS[plane] == 2 else words[block, row]
    byte = row_of_words.contiguous().view(torch.uint8)[4 * pair + 2 * upper + odd].item()
    return byte >> (2 * place + (bit if PLANE_WIDTHS[plane] == 2 else half)) & 1


@pytest.mark.parametrize(("n", "k"), [(1, 8), (130, 520), (7, 1536), (128, 512)])
def test_every_bit_lies_where_the_layout_says(n: int, k: int) -> None:
    codes, scales = random_layer(n, k, 128)
    planes, _ = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, k, 128)
    generator = torch.Generator().manual_seed(0)
    for row, column in zip(
        torch.randint(0, n, (40,), generator=generator).tolist(),
        torch.randint(0, k, (40,), generator=generator).tolist(),
        strict=True,
    ):
        code, position = 0, 8
        for plane, width in enumerate(PLANE_WIDTHS):
            position -= width
            for bit in range(width):
                code |= bit_of(planes[plane], plane, row, column, bit) << (position + bit)
        assert code == codes[row, column].item()


def test_sizes_are_padded_and_padding_is_zero() -> None:
    codes, scales = random_layer(130, 520, 32)
    planes, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 520, 32)
    n = padded(130, PAD_N)
    assert [tuple(plane.shape) for plane in planes] == [(2, 2, n, 32), (2, n, 32), (2, n, 32), (2, 2, n, 32), (2, 2, n, 32)]
    assert all(plane.dtype == torch.int16 for plane in planes)
    assert kernel_scales.shape == (32, n)
    assert torch.equal(kernel_scales[:17, :130], scales.T)
    assert kernel_scales[17:].abs().sum() == 0
    assert kernel_scales[:, 130:].abs().sum() == 0
    assert all(plane[..., 130:, :].abs().sum() == 0 for plane in planes)


def test_a_row_of_a_plane_takes_its_share_of_the_codes_bytes() -> None:
    codes, scales = random_layer(128, 1024, 128)
    planes, _ = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 1024, 128)
    assert [plane.nbytes * 8 / codes.numel() for plane in planes] == list(PLANE_WIDTHS)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_fewer_planes_of_any_checkpoint_layout_give_the_same_leading_planes(bits: int) -> None:
    codes, scales = random_layer(9, 640, 64)
    whole, _ = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 640, 64)
    for layout in (LAYOUT, PlaneLayout((1, 1, 1, 1, 2, 2))):
        held = layout.split(codes)[: layout.num_planes(bits)]
        planes, _ = to_kernel_layout(held, scales, layout, 640, 64)
        assert len(planes) == num_planes(bits)
        assert all(torch.equal(plane, expected) for plane, expected in zip(planes, whole, strict=False))


def test_one_scale_per_channel_is_one_row() -> None:
    codes, scales = random_layer(5, 96, -1)
    _, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 96, -1)
    assert kernel_scales.shape == (1, PAD_N)
    assert torch.equal(kernel_scales[0, :5], scales[:, 0])
