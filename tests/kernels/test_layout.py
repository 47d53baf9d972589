"""kernels.layout: where every bit of a code lies, and that planes come apart and go together."""

import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import num_groups
from matgptq_vllm.kernels.layout import (
    PLANE_WIDTHS,
    num_planes,
    plane_shapes,
    scales_shape,
    to_kernel_layout,
    write_kernel_planes,
)

LAYOUT = PlaneLayout()


def random_layer(n: int, k: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(n, num_groups(k, group_size), generator=generator).bfloat16() + 0.5


def sign_and_magnitude(planes: list[torch.Tensor], row: int, column: int) -> tuple[int, int]:
    """Of one code, looked up as the module's table says."""
    unit, row_of_unit = divmod(row, 16)
    e, g = divmod(row_of_unit, 8)
    unit_k, column_of_unit = divmod(column, 128)
    p, column_of_piece = divmod(column_of_unit, 32)
    i, u, j, lane_bit = column_of_piece >> 4, column_of_piece >> 3 & 1, column_of_piece >> 1 & 3, column_of_piece & 1
    lane, n, q = 4 * g + j, 4 * lane_bit + 2 * u + e, 2 * (p % 2) + i

    def bits(plane: int, start: int, count: int) -> int:
        words = planes[plane][unit, unit_k]
        word = words[lane, p if PLANE_WIDTHS[plane] == 2 else p // 2]
        return int(word.item()) >> start & ((1 << count) - 1)

    magnitude = bits(0, 4 * n + 2 - 2 * i, 1) << 6 | bits(1, 4 * n + (q ^ 1), 1) << 5 | bits(2, 4 * n + q, 1) << 4
    magnitude |= bits(3, 4 * n + 2 - 2 * i, 2) << 2 | bits(4, 4 * n + 2 * i, 2)
    return bits(0, 4 * n + 3 - 2 * i, 1), magnitude


def by_output(kernel_scales: torch.Tensor) -> torch.Tensor:
    """Scales in the kernel layout -> [padded N, groups]."""
    units, groups = kernel_scales.shape[:2]
    return kernel_scales.permute(0, 3, 2, 1).reshape(16 * units, groups)


@pytest.mark.parametrize(("n", "k"), [(1, 8), (130, 520), (7, 1536), (128, 512), (2100, 40)])
def test_every_bit_lies_where_the_layout_says(n: int, k: int) -> None:
    codes, scales = random_layer(n, k, 128)
    planes, _ = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, k, 128)
    generator = torch.Generator().manual_seed(0)
    for row, column in zip(
        torch.randint(0, n, (200,), generator=generator).tolist(),
        torch.randint(0, k, (200,), generator=generator).tolist(),
        strict=True,
    ):
        code = int(codes[row, column])
        assert sign_and_magnitude(planes, row, column) == ((0, code - 128) if code >= 128 else (1, 127 - code))


def test_no_two_codes_share_a_bit() -> None:
    # 127 is a sign and no magnitude, 0 all of both.
    codes = torch.full((16, 128), 127, dtype=torch.uint8)
    codes[:, ::3] = 0
    planes, _ = to_kernel_layout(LAYOUT.split(codes), torch.ones(16, 1), LAYOUT, 128, -1)
    ones = [sum((word & 0xFFFFFFFF).bit_count() for word in plane[0, 0].flatten().tolist()) for plane in planes]
    full = int((codes == 0).sum())
    assert ones == [codes.numel() + full, full, full, 2 * full, 2 * full]


def test_sizes_are_padded_and_padding_is_zero() -> None:
    codes, scales = random_layer(130, 520, 32)
    planes, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 520, 32)
    double, single = (12, 5, 32, 4), (12, 5, 32, 2)
    assert [tuple(plane.shape) for plane in planes] == plane_shapes(130, 520) == [double, single, single, double, double]
    assert all(plane.dtype == torch.int32 for plane in planes)
    assert all(plane[9:].abs().sum() == 0 for plane in planes)
    assert all(sign_and_magnitude(planes, row, column) == (0, 0) for row, column in ((130, 5), (143, 519), (3, 520), (90, 639)))
    assert (kernel_scales.shape, kernel_scales.dtype) == (scales_shape(130, 520, 32), torch.bfloat16)
    found = by_output(kernel_scales)
    assert found.shape == (192, 20)
    assert torch.equal(found[:130, :17], scales)
    assert found[:, 17:].abs().sum() == 0
    assert found[130:].abs().sum() == 0


def test_planes_take_their_share_of_the_codes_bytes() -> None:
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


def test_one_scale_per_channel_is_one_group() -> None:
    codes, scales = random_layer(5, 96, -1)
    _, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 96, -1)
    assert kernel_scales.shape == scales_shape(5, 96, -1) == (4, 1, 8, 2)
    assert torch.equal(by_output(kernel_scales)[:5], scales)


@pytest.mark.parametrize(
    ("given", "held"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)]
)
def test_scales_are_held_exactly(given: torch.dtype, held: torch.dtype) -> None:
    codes, scales = random_layer(5, 96, 32)
    scales = (scales.float() * 1.001).to(given)
    _, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, 96, 32)
    assert kernel_scales.dtype == held
    assert torch.equal(by_output(kernel_scales)[:5, :3], scales.to(held))


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_lower_planes_are_written_again_from_their_own_bits_and_the_signs(first: int) -> None:
    layout = PlaneLayout()
    planes = layout.split(torch.randint(0, 256, (130, 520), dtype=torch.uint8, generator=torch.Generator().manual_seed(first)))
    whole, _ = to_kernel_layout(planes, torch.ones(130, 5, dtype=torch.bfloat16), layout, 520, 128)
    targets = {plane: torch.full_like(whole[plane], -1) for plane in range(first, 5)}
    for target in targets.values():
        target[-(-130 // 16) :] = 0  # units of padding alone are left as they are
    write_kernel_planes({plane: planes[plane] for plane in (0, *range(first, 5))}, layout, 520, targets)
    for plane, target in targets.items():
        assert torch.equal(target, whole[plane])
