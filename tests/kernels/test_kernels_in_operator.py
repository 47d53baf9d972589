"""The operator in the kernel layout, as the plugin calls it: compiled where there is a GPU, elsewhere in the interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SliceRule, bits_read, num_groups
from matgptq_vllm.engine.step_buffers import StepBuffers
from matgptq_vllm.kernels.reference import sliced_linear
from matgptq_vllm.kernels.resident import to_resident

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LAYOUT = PlaneLayout()
PROFILE_WIDTHS = (2, 3, 4, 6, 8, 4, 2)
DEFAULT = 4
MAX_TOKENS = 40

COMPUTE = """
import sys, torch
from matgptq_vllm.kernels import ops, tuning
ops.register_ops()
results = []
for dense, arguments in torch.load(sys.argv[1]):
    if dense:
        tuning.dense_from = lambda n, k, device: 1
    y = torch.ops.matgptq.sliced_linear(*arguments)
    results.append((y, arguments[9]))
torch.save(results, sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """A step of one layer."""

    requests: tuple[tuple[int, int], ...]
    """(profile, rows) of each."""
    padding: int = 0
    n: int = 40
    k: int = 200
    group_size: int = 128
    rule: SliceRule = "curved"
    dtype: torch.dtype = torch.bfloat16
    biased: bool = False
    widths: tuple[int, ...] = WIDTHS
    dense: bool = False

    @property
    def m(self) -> int:
        return sum(rows for _, rows in self.requests) + self.padding

    def inputs(self) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """x, planes and scales in the checkpoint layout, bias."""
        generator = torch.Generator().manual_seed(self.n * self.k + self.m)
        codes = torch.randint(0, 256, (self.n, self.k), dtype=torch.uint8, generator=generator)
        groups = num_groups(self.k, self.group_size)
        scales = (torch.rand(self.n, groups, generator=generator) * 0.02 + 0.001).bfloat16()
        x = torch.randn(self.m, self.k, generator=generator).to(self.dtype)
        bias = torch.randn(self.n, generator=generator).to(self.dtype) if self.biased else None
        planes = LAYOUT.split(codes)[: LAYOUT.num_planes(bits_read(max(self.widths), self.rule))]
        return (
            x.to(DEVICE),
            [plane.to(DEVICE) for plane in planes],
            scales.to(DEVICE),
            None if bias is None else bias.to(DEVICE),
        )

    def profile_widths(self) -> torch.Tensor:
        return torch.tensor([min(width, max(self.widths)) for width in PROFILE_WIDTHS], dtype=torch.int32)

    def arguments(self) -> tuple:
        """The operator's."""
        buffers = StepBuffers(MAX_TOKENS, len(PROFILE_WIDTHS), DEFAULT, DEVICE)
        buffers.write(*np.array(self.requests, dtype=np.int32).T)
        x, planes, scales, bias = self.inputs()
        planes, scales, locks = to_resident(planes, scales, LAYOUT, self.k, self.group_size)
        widths = self.profile_widths()
        return (
            x, planes, scales, self.n, buffers.token_profiles, widths.to(DEVICE), buffers.row_order, buffers.step_profiles,
            widths, locks, list(self.widths), list(LAYOUT.plane_widths), self.group_size, self.rule, bias,
        )  # fmt: skip

    def row_widths(self) -> list[int]:
        """Of the step's rows, padding not included."""
        return [int(self.profile_widths()[profile]) for profile, rows in self.requests for _ in range(rows)]


ONE = [Case(((profile, 3),), rule=rule) for profile, rule in ((0, "nested"), (1, "curved"), (2, "round"), (4, "curved"))]
MIXED = [
    Case(((4, 1), (0, 1), (2, 2), (6, 1)), k=392),
    Case(((2, 9), (4, 2), (1, 7), (5, 4)), padding=5, group_size=64, n=72, k=264, biased=True),
    Case(((3, 1), (2, 1)), group_size=-1, rule="nested", dtype=torch.float16),
    # A replica that holds the planes of width 4 only.
    Case(((2, 1), (1, 2)), group_size=32, widths=(2, 3, 4), biased=True),
]
DENSE = [
    Case(((2, 5),), padding=1, dense=True, biased=True),
    Case(((4, 3), (2, 1), (0, 4), (5, 2)), padding=3, n=130, dense=True, rule="round", dtype=torch.float16),
]
CASES = ONE + MIXED + DENSE


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]
) -> dict[Case, tuple[torch.Tensor, torch.Tensor]]:
    """The product of each case, and its locks afterwards."""
    directory = tmp_path_factory.mktemp("operator")
    torch.save([(case.dense, case.arguments()) for case in CASES], directory / "cases.pt")
    run_kernels(COMPUTE, directory / "cases.pt", directory / "results.pt")
    return dict(zip(CASES, torch.load(directory / "results.pt"), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_meets_the_weights_of_its_width(case: Case, found: dict[Case, tuple[torch.Tensor, torch.Tensor]]) -> None:
    y, locks = found[case]
    assert (y.shape, y.dtype) == ((case.m, case.n), case.dtype)
    assert not locks.any()
    widths = case.row_widths()
    x, planes, scales, bias = case.inputs()
    row_widths = torch.tensor(widths, dtype=torch.int32, device=DEVICE)
    reference = sliced_linear(
        x[: len(widths)].double(), planes, scales.double(), row_widths, case.widths, LAYOUT, case.group_size, case.rule
    )
    if bias is not None:
        reference += bias
    errors = (y[: len(widths)].double() - reference).norm(dim=1) / reference.norm(dim=1)
    assert errors.max() < 1e-2
    # Padding is computed too, and costs no rows of others.
    assert y.isfinite().all()


def test_a_width_is_not_mistaken_for_another(found: dict[Case, tuple[torch.Tensor, torch.Tensor]]) -> None:
    case = MIXED[0]
    y, _ = found[case]
    x, planes, scales, _ = case.inputs()
    for row, width in enumerate(case.row_widths()):
        for other in set(WIDTHS) - {width}:
            widths = torch.tensor([other], dtype=torch.int32, device=DEVICE)
            wrong = sliced_linear(
                x[row : row + 1].double(), planes, scales.double(), widths, [other], LAYOUT, case.group_size, case.rule
            )
            assert (y[row].double() - wrong).norm() / wrong.norm() > 1e-2, (width, other)
