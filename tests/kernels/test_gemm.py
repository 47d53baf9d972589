"""kernels.gemm against float64: compiled where there is a GPU, elsewhere in Triton's interpreter."""

import json
from collections.abc import Callable

import pytest
import torch

ON_GPU = torch.cuda.is_available()

RUN = """
import itertools, json, sys, torch
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import SLICE_RULES, dequantize, num_groups
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.gemm import num_locks, sliced_gemm
from matgptq_vllm.kernels.layout import to_kernel_layout

device = sys.argv[1]
WIDTHS = (2, 3, 4, 6, 8)
LAYOUT = PlaneLayout()

def layer(n, k, group_size):
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator).to(device)
    scales = (torch.rand(n, num_groups(k, group_size), generator=generator) * 0.02 + 0.001).bfloat16().to(device)
    return codes, scales

def product(codes, scales, x, row_widths, widths, group_size, rule, config, ordered=False, bias=None, poison=0):
    n, k = codes.shape
    planes, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, k, group_size)
    if poison:
        planes = [plane if index < poison else plane.fill_(-1) for index, plane in enumerate(planes)]
    profiles = torch.tensor([widths.index(width) for width in row_widths], dtype=torch.int32, device=device)
    table = torch.tensor(widths, dtype=torch.int32, device=device)
    locks = torch.zeros(num_locks(n), dtype=torch.int32, device=device)
    order = torch.argsort(profiles, stable=True).int() if ordered else None
    y = sliced_gemm(x, planes, kernel_scales, n, profiles, table, widths, group_size, rule, config, locks, order, bias)
    assert not locks.any()
    return y

def error(y, codes, scales, x, row_widths, group_size, rule, bias=None):
    expected = torch.stack([
        x[row].double() @ dequantize(codes, scales, width, rule, group_size, torch.float64).T
        for row, width in enumerate(row_widths)
    ])
    expected = expected if bias is None else expected + bias.double()
    return ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()

narrow, small, split, large = Config(8, 16, 4, 2), Config(8, 64, 2, 1), Config(16, 64, 2, 1, split_k=2), Config(32, 32, 8, 1)
found = {}
generator = torch.Generator().manual_seed(1)
def draw(m, k, dtype=torch.bfloat16):
    return torch.randn(m, k, generator=generator).to(device, dtype)

# Small for the interpreter, but with several units, and shares of K per program that are not the same.
shapes = [(40, 136, 32, 1, small), (40, 520, 64, 17, split), (24, 512, 128, 3, narrow), (72, 520, -1, 33, large)]
for rule, width, (n, k, group_size, m, config) in itertools.product(SLICE_RULES, WIDTHS, shapes):
    if rule != "curved" and m > 1:
        continue
    codes, scales = layer(n, k, group_size)
    x = draw(m, k, torch.float16 if group_size == 64 else torch.bfloat16)
    bias = draw(1, n)[0] if group_size == 32 else None
    y = product(codes, scales, x, [width] * m, (width,), group_size, rule, config, bias=bias)
    found[f"uniform {rule} {width} {group_size} {m}"] = error(y, codes, scales, x, [width] * m, group_size, rule, bias)

codes, scales = layer(40, 392, 128)
for rule, m, config in (("curved", 5, small), ("nested", 20, split), ("round", 9, small)):
    x = draw(m, 392)
    row_widths = [(4, 8, 2, 6, 3)[row % 5] for row in range(m)]
    y = product(codes, scales, x, row_widths, WIDTHS, 128, rule, config, ordered=m > config.block_m)
    found[f"mixed {rule}"] = error(y, codes, scales, x, row_widths, 128, rule)
    # The same row at the same width has the same bits whatever is beside it.
    for width in (4, 8):
        alone = product(codes, scales, x, [width] * m, WIDTHS, 128, rule, config)
        rows = [row for row in range(m) if row_widths[row] == width]
        found[f"bits {rule} {width}"] = 0.0 if torch.equal(y[rows], alone[rows]) else 1.0

strided = draw(6, 2 * 392)[:, :392]
found["strided rows"] = error(
    product(codes, scales, strided, [4] * 6, (4,), 128, "curved", small), codes, scales, strided, [4] * 6, 128, "curved"
)
codes, scales = layer(40, 200, 128)
x = draw(4, 200)
for width, planes_read in ((2, 1), (3, 2), (4, 3), (6, 4)):
    whole = product(codes, scales, x, [width] * 4, WIDTHS, 128, "curved", small)
    poisoned = product(codes, scales, x, [width] * 4, WIDTHS, 128, "curved", small, poison=planes_read)
    found[f"poisoned planes below {width}"] = 0.0 if torch.equal(whole, poisoned) else 1.0
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]) -> dict[str, float]:
    """Relative error of every case; 0 or 1 for what holds or not."""
    path = tmp_path_factory.mktemp("gemm") / "found.json"
    run_kernels(RUN, "cuda" if ON_GPU else "cpu", path)
    result: dict[str, float] = json.loads(path.read_text())
    return result


def test_every_width_rule_group_and_shape_is_within_a_hundredth_of_float64(found: dict[str, float]) -> None:
    uniform = {case: error for case, error in found.items() if case.startswith("uniform")}
    assert len(uniform) == 30
    assert {case: error for case, error in uniform.items() if not error < 1e-2} == {}


@pytest.mark.parametrize("rule", ["curved", "nested", "round"])
def test_rows_of_all_widths_in_one_call(rule: str, found: dict[str, float]) -> None:
    assert found[f"mixed {rule}"] < 1e-2


@pytest.mark.parametrize("rule", ["curved", "nested", "round"])
def test_a_row_has_the_same_bits_in_a_mixed_and_in_a_uniform_batch(rule: str, found: dict[str, float]) -> None:
    assert found[f"bits {rule} 4"] == 0
    assert found[f"bits {rule} 8"] == 0


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_lower_planes_are_never_used(width: int, found: dict[str, float]) -> None:
    assert found[f"poisoned planes below {width}"] == 0


def test_rows_may_be_strided(found: dict[str, float]) -> None:
    assert found["strided rows"] < 1e-2
