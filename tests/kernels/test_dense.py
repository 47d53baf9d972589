"""kernels.dense against core.slicing: compiled where there is a GPU, elsewhere in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, bits_read, dequantize, num_groups
from matgptq_vllm.kernels.dense import STRIP_BYTES, rows_per_strip
from matgptq_vllm.kernels.layout import num_planes, to_kernel_layout

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LAYOUT = PlaneLayout()

COMPUTE = """
import sys, torch
from matgptq_vllm.kernels import dense
results = []
for strip_bytes, out_shape, first_row, arguments in torch.load(sys.argv[1]):
    if out_shape is None:
        dense.STRIP_BYTES = strip_bytes
        results.append(dense.dense_linear(*arguments))
    else:
        planes, scales, width, group_size, rule, dtype = arguments
        if isinstance(width, tuple):
            width = dense.WidthOnDevice(torch.tensor(width[0], device=scales.device), (2, 3, 4, 6, 8))
        out = torch.full((out_shape[0] + 1, out_shape[1]), float("nan"), dtype=dtype, device=scales.device)
        dense.expand(planes, scales, width, group_size, rule, first_row, out[:-1])
        results.append(out)
torch.save(results, sys.argv[2])
"""


@dataclass(frozen=True)
class Layer:
    """A random layer and what is asked of it."""

    n: int
    k: int
    group_size: int
    rule: SliceRule
    dtype: torch.dtype

    def codes_and_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, k], and bfloat16 [n, groups]."""
        generator = torch.Generator().manual_seed(self.n + self.k)
        codes = torch.randint(0, 256, (self.n, self.k), dtype=torch.uint8, generator=generator)
        scales = torch.rand(self.n, num_groups(self.k, self.group_size), generator=generator) * 0.02 + 0.001
        return codes.to(DEVICE), scales.bfloat16().to(DEVICE)

    def kernel_tensors(self, width: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The planes that ``width`` reads, no other, and the scales."""
        codes, scales = self.codes_and_scales()
        planes, kernel_scales = to_kernel_layout(LAYOUT.split(codes), scales, LAYOUT, self.k, self.group_size)
        return planes[: num_planes(bits_read(width, self.rule))], kernel_scales

    def weights(self, width: int) -> torch.Tensor:
        """float64 [n, k]."""
        codes, scales = self.codes_and_scales()
        return dequantize(codes, scales, width, self.rule, self.group_size, torch.float64)

    def steps(self) -> torch.Tensor:
        """float64 [n, k]: what a code's last bit is worth."""
        _, scales = self.codes_and_scales()
        size = self.k if self.group_size == -1 else self.group_size
        return scales.double().repeat_interleave(size, dim=1)[:, : self.k]


@dataclass(frozen=True)
class Expansion:
    """Rows ``first_row`` .. ``first_row + rows - 1`` of a layer at a width, which may be known on the device only."""

    layer: Layer
    width: int
    first_row: int
    rows: int
    on_device: bool = False

    def request(self) -> tuple:
        planes, scales = self.layer.kernel_tensors(8 if self.on_device else self.width)
        width = (self.width,) if self.on_device else self.width
        arguments = (planes, scales, width, self.layer.group_size, self.layer.rule, self.layer.dtype)
        return (0, (self.rows, self.layer.k), self.first_row, arguments)


@dataclass(frozen=True)
class Product:
    """A product of 7 rows, of which each width of ``widths`` has every len(widths)-th."""

    layer: Layer
    widths: tuple[int, ...]
    strip_bytes: int = STRIP_BYTES
    bias: bool = False

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """x [7, k], a view of wider rows, and bias float32 [n]."""
        generator = torch.Generator().manual_seed(self.layer.n)
        x = torch.randn(7, self.layer.k + 16, generator=generator).to(self.layer.dtype)[:, : self.layer.k]
        return x.to(DEVICE), torch.randn(self.layer.n, generator=generator).to(DEVICE)

    def request(self) -> tuple:
        x, bias = self.inputs()
        planes, scales = self.layer.kernel_tensors(max(self.widths))
        step = len(self.widths)
        rows = [
            (width, None if step == 1 else torch.arange(start, 7, step, dtype=torch.int32, device=DEVICE))
            for start, width in enumerate(self.widths)
        ]
        layer = self.layer
        arguments = (x, planes, scales, layer.n, layer.k, rows, layer.group_size, layer.rule, bias if self.bias else None)
        return (self.strip_bytes, None, 0, arguments)

    def expected(self) -> torch.Tensor:
        """float64 [7, n]."""
        x, bias = self.inputs()
        product = x.new_empty(7, self.layer.n, dtype=torch.float64)
        for start, width in enumerate(self.widths):
            product[start :: len(self.widths)] = x[start :: len(self.widths)].double() @ self.layer.weights(width).T
        return product + bias.double() if self.bias else product


BASE = Layer(24, 392, 128, "curved", torch.float16)
EXPANSIONS = [Expansion(replace(BASE, rule=rule), width, 0, 24) for rule in SLICE_RULES for width in WIDTHS]
EXPANSIONS += [Expansion(replace(BASE, group_size=group), 4, 0, 24) for group in (-1, 32, 64)]
EXPANSIONS += [Expansion(BASE, width, 16, 7, on_device=True) for width in (2, 6)]
EXPANSIONS += [
    Expansion(Layer(50, 512, 32, "nested", torch.bfloat16), 3, 0, 50),
    Expansion(Layer(300, 96, 32, "curved", torch.float16), 8, 128, 131),
    Expansion(Layer(130, 512, 64, "round", torch.bfloat16), 2, 64, 66),
    Expansion(Layer(7, 1120, -1, "round", torch.bfloat16), 6, 0, 7),
    # Rows of no whole 16 bytes.
    Expansion(Layer(20, 77, -1, "curved", torch.bfloat16), 8, 0, 20),
    Expansion(Layer(33, 300, 32, "nested", torch.float16), 3, 16, 17),
]
PRODUCTS = [
    Product(BASE, (4,), bias=True),
    Product(Layer(300, 96, 32, "nested", torch.bfloat16), (2, 4, 8), strip_bytes=128 * 96 * 2, bias=True),
    Product(Layer(300, 96, 32, "curved", torch.float16), (8, 3), strip_bytes=1),
]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]
) -> dict[Expansion | Product, torch.Tensor]:
    """What the kernel makes of each case."""
    directory = tmp_path_factory.mktemp("dense")
    cases = [*EXPANSIONS, *PRODUCTS]
    torch.save([case.request() for case in cases], directory / "cases.pt")
    run_kernels(COMPUTE, directory / "cases.pt", directory / "results.pt")
    return dict(zip(cases, torch.load(directory / "results.pt"), strict=True))


@pytest.mark.parametrize("case", EXPANSIONS, ids=str)
def test_an_expanded_layer_is_its_weights_rounded_once(case: Expansion, found: dict[Expansion | Product, torch.Tensor]) -> None:
    exact = case.layer.weights(case.width)[case.first_row : case.first_row + case.rows]
    result = found[case]
    error = (result[:-1].double() - exact).abs()
    # Half a unit in the last place; Triton's interpreter truncates to bfloat16.
    unit = 2.0**-7 if case.layer.dtype == torch.bfloat16 else 2.0**-10
    allowed = unit * (1.0 if case.layer.dtype == torch.bfloat16 and not ON_GPU else 0.5) * exact.abs()
    if ON_GPU:
        # What levels of half precision are off by: a share of the level, and of a step of 8 bits, which levels near 0 are small
        # against.
        allowed += 2e-3 * exact.abs() + 0.05 * case.layer.steps()[case.first_row : case.first_row + case.rows]
    assert (error <= allowed).all(), (error - allowed).max()
    assert result[-1].isnan().all()  # what lies behind the last row is not touched


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_every_row_meets_the_weights_of_its_width(case: Product, found: dict[Expansion | Product, torch.Tensor]) -> None:
    expected = case.expected()
    error = (found[case].double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert found[case].dtype == case.layer.dtype
    assert error.max() < 1e-2


@pytest.mark.parametrize("n", [1, 128, 129, 896, 28672, 57344])
@pytest.mark.parametrize("bytes_per_row", [2 * 896, 2 * 14336, STRIP_BYTES])
def test_strips_are_equal_but_for_the_last_and_keep_to_the_bound(n: int, bytes_per_row: int) -> None:
    rows = rows_per_strip(n, bytes_per_row)
    assert rows % 128 == 0
    assert rows * bytes_per_row <= STRIP_BYTES or rows == 128
    strips = -(-n // rows)
    assert (rows - 128) * strips < n  # narrower strips would be more
