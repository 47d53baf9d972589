"""kernels.reference: every row of a product meets the weights of its own width."""

import itertools

import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, bits_read, dequantize, num_groups
from matgptq_vllm.kernels.reference import sliced_linear

LAYOUT = PlaneLayout()
SHAPES = [(1, 8), (5, 7), (17, 130), (33, 256), (7, 896)]


def make_layer(n: int, k: int, group_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, num_groups(k, group_size), generator=generator) * 0.02 + 0.001
    return codes, scales.bfloat16()


def expected(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, row_widths: list[int], group_size: int, rule: str):
    rows = [
        x[m].double() @ dequantize(codes, scales, width, rule, group_size, torch.float64).T
        for m, width in enumerate(row_widths)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 7, 17])
def test_rows_of_every_width_in_one_call_match_float64(n: int, k: int, m: int, group_size: int, rule: str) -> None:
    codes, scales = make_layer(n, k, group_size)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    row_widths = list(itertools.islice(itertools.cycle((4, 8, 2, 6, 3)), m))
    y = sliced_linear(
        x, LAYOUT.split(codes), scales, torch.tensor(row_widths, dtype=torch.int32), WIDTHS, LAYOUT, group_size, rule
    )
    torch.testing.assert_close(y.double(), expected(x, codes, scales, row_widths, group_size, rule), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("max_width", WIDTHS)
def test_a_width_needs_only_its_own_planes(max_width: int, rule: str) -> None:
    codes, scales = make_layer(9, 96, 32)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    planes = LAYOUT.split(codes)[: LAYOUT.num_planes(bits_read(max_width, rule))]
    widths = [width for width in WIDTHS if width <= max_width]
    row_widths = [widths[m % len(widths)] for m in range(4)]
    y = sliced_linear(x, planes, scales, torch.tensor(row_widths, dtype=torch.int32), widths, LAYOUT, 32, rule)
    torch.testing.assert_close(y.double(), expected(x, codes, scales, row_widths, 32, rule), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_activations_type(dtype: torch.dtype) -> None:
    codes, scales = make_layer(16, 128, 128)
    x = torch.randn(3, 128).to(dtype)
    row_widths = torch.tensor([8, 4, 2], dtype=torch.int32)
    y = sliced_linear(x, LAYOUT.split(codes), scales, row_widths, WIDTHS, LAYOUT, 128, "nested")
    assert y.dtype == dtype
    reference = expected(x, codes, scales, [8, 4, 2], 128, "nested")
    assert (y.double() - reference).norm() / reference.norm() < 1e-2
