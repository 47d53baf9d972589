"""kernels.cpu: levels of every code, products of every width against float64 and the plain oracle, rows among others."""

import itertools
import subprocess
import sys

import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, bits_read, dequantize, num_groups
from matgptq_vllm.kernels import cpu, reference
from matgptq_vllm.kernels.cpu_words import CHUNK, in_word_order, signed_codes

LAYOUT = PlaneLayout()
LAYOUTS = [LAYOUT, PlaneLayout((1,) * 8), PlaneLayout((1, 1, 1, 1, 2, 1, 1))]
GROUP_SIZES = [32, 64, 128, -1]


def make_layer(n: int, k: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, num_groups(k, group_size), generator=generator) * 0.02 + 0.001
    return codes, scales.bfloat16()


def make_x(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def leading(codes: torch.Tensor, width: int, rule: SliceRule, layout: PlaneLayout = LAYOUT) -> list[torch.Tensor]:
    """Only the planes that ``width`` needs, so that reading another fails."""
    return layout.split(codes)[: layout.num_planes(bits_read(width, rule))]


def product(x, planes, scales, row_widths, group_size, rule, layout=LAYOUT) -> torch.Tensor:
    return cpu.sliced_linear(x, planes, scales, torch.tensor(row_widths, dtype=torch.int32), layout, group_size, rule)


def exact(x, codes, scales, row_widths, group_size, rule) -> torch.Tensor:
    weights = {width: dequantize(codes, scales, width, rule, group_size, torch.float64) for width in set(row_widths)}
    return torch.stack([weights[width] @ row.double() for width, row in zip(row_widths, x, strict=True)])


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest relative error of a row."""
    assert y.shape == wanted.shape
    return float(((y.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("k", [8, 32, 130])
def test_codes_are_joined_from_any_number_of_planes_in_the_order_of_x(k: int, layout: PlaneLayout) -> None:
    codes, _ = make_layer(7, k, -1)
    for count in range(1, len(layout.plane_widths) + 1):
        planes = layout.split(codes)[:count]
        columns = in_word_order(torch.arange(1.0, k + 1).unsqueeze(0))[0].long()
        joined = signed_codes(planes, layout).view(torch.int8).view(7, -1)[:, columns > 0].int() + 128
        assert torch.equal(joined, layout.join(planes, k).int()[:, columns[columns > 0] - 1])


@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_codes_weight_is_exact(width: int, rule: SliceRule) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scales = torch.ones(1, 1)
    weights = product(torch.eye(256), leading(codes, width, rule), scales, [width] * 256, -1, rule)
    assert torch.equal(weights.T, dequantize(codes, scales, width, rule, -1))


@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (5, 7), (17, 130), (33, 256), (7, 896)])
@pytest.mark.parametrize("m", [1, 7])
def test_rows_of_every_width_in_one_call_match_float64(n: int, k: int, m: int, group_size: int, rule: SliceRule) -> None:
    codes, scales = make_layer(n, k, group_size)
    x = make_x(m, k)
    row_widths = list(itertools.islice(itertools.cycle((4, 8, 2, 6, 3)), m))
    y = product(x, LAYOUT.split(codes), scales, row_widths, group_size, rule)
    assert error(y, exact(x, codes, scales, row_widths, group_size, rule)) < 1e-6


@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_width_needs_only_its_own_planes_in_any_layout(width: int, rule: SliceRule, layout: PlaneLayout) -> None:
    for group_size, k in ((32, 72), (-1, 96), (128, 256)):
        codes, scales = make_layer(9, k, group_size)
        x = make_x(3, k)
        y = product(x, leading(codes, width, rule, layout), scales, [width] * 3, group_size, rule, layout)
        assert error(y, exact(x, codes, scales, [width] * 3, group_size, rule)) < 1e-6


@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("k", [130, 256])
def test_blocks_of_outputs_join_up(k: int, rule: SliceRule, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = make_layer(23, k, 64)
    x, row_widths = make_x(4, k), [3, 8, 3, 2]
    whole = product(x, LAYOUT.split(codes), scales, row_widths, 64, rule)
    # Three rows and part of one: neither divides 23.
    for size in (3 * 256 + 1, 1):
        monkeypatch.setattr(cpu, "BLOCK_WEIGHTS", size)
        cpu._memory.__dict__.clear()
        y = product(x, LAYOUT.split(codes), scales, row_widths, 64, rule)
        assert error(y, whole.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_meet_float32_weights(dtype: torch.dtype) -> None:
    codes, scales = make_layer(16, 256, 128)
    x = make_x(5, 256).to(dtype)
    row_widths = [8, 4, 2, 2, 8]
    y = product(x, LAYOUT.split(codes), scales, row_widths, 128, "curved")
    assert y.dtype == dtype
    # Only the result is rounded, so an error of a unit in the last place is the most there may be.
    wanted = exact(x, codes, scales, row_widths, 128, "curved")
    torch.testing.assert_close(y.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("multiplies", [False, True], ids=["float32", "bfloat16"])
def test_many_rows_of_a_width_match_the_oracle(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_multiplies_bfloat16", lambda: multiplies)
    codes, scales = make_layer(40, 256, 128)
    row_widths = [4] * cpu.DENSE_FROM + [8, 2, 8]
    x = make_x(len(row_widths), 256).bfloat16()
    planes = LAYOUT.split(codes)
    y = product(x, planes, scales, row_widths, 128, "curved")
    widths = torch.tensor(row_widths, dtype=torch.int32)
    oracle = reference.sliced_linear(x, planes, scales, widths, WIDTHS, LAYOUT, 128, "curved")
    assert error(y, oracle.double()) < 1e-2
    wanted = exact(x, codes, scales, row_widths, 128, "curved")
    assert error(y, wanted) < 4e-3
    assert error(y[-3:], wanted[-3:]) < 2.5e-3


@pytest.mark.parametrize("rule", SLICE_RULES)
def test_rows_of_other_widths_change_no_bit(rule: SliceRule) -> None:
    codes, scales = make_layer(33, 256, 64)
    planes, x = LAYOUT.split(codes), make_x(6, 256)
    row_widths = [2, 8, 3, 2, 3, 6]
    mixed = product(x, planes, scales, row_widths, 64, rule)
    for width in set(row_widths):
        rows = [row for row, given in enumerate(row_widths) if given == width]
        alone = product(x[rows], leading(codes, width, rule), scales, [width] * len(rows), 64, rule)
        assert torch.equal(mixed[rows], alone)


def test_planes_may_lie_anywhere_in_memory() -> None:
    codes, scales = make_layer(9, 256, 128)
    x = make_x(2, 256)
    wanted = exact(x, codes, scales, [8, 3], 128, "nested")
    for offset in (1, 3):
        wide = [torch.nn.functional.pad(plane, (offset, 2)) for plane in LAYOUT.split(codes)]
        strided = [plane[:, offset:-2] for plane in wide]
        assert error(product(x, strided, scales, [8, 3], 128, "nested"), wanted) < 1e-6
        odd = [torch.nn.functional.pad(plane.flatten(), (offset, 0))[offset:].view(9, -1) for plane in LAYOUT.split(codes)]
        assert error(product(x, odd, scales, [8, 3], 128, "nested"), wanted) < 1e-6


def test_no_rows_are_no_results() -> None:
    codes, scales = make_layer(9, CHUNK, 32)
    y = product(torch.empty(0, CHUNK), LAYOUT.split(codes), scales, [], 32, "nested")
    assert y.shape == (0, 9)


def test_what_was_first_computed_in_inference_mode_is_computed_outside_of_it_too() -> None:
    script = (
        "import torch\n"
        "from matgptq_vllm.core.planes import PlaneLayout\n"
        "from matgptq_vllm.kernels.cpu import sliced_linear\n"
        "planes = PlaneLayout().split(torch.randint(0, 256, (64, 128), dtype=torch.uint8))\n"
        "widths = torch.tensor([2, 4, 8], dtype=torch.int32)\n"
        "given = (torch.randn(3, 128), planes, torch.ones(64, 1), widths, PlaneLayout(), 128, 'curved')\n"
        "with torch.inference_mode():\n"
        "    inside = sliced_linear(*given)\n"
        "assert torch.equal(sliced_linear(*given), inside)\n"
    )
    # A process of its own: what is kept between calls must first be made in inference mode.
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
