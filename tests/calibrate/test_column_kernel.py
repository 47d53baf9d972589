"""calibrate.column_kernel against its twin: compiled where there is a GPU, elsewhere in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from calibrate.column_sweep import sweep_columns
from calibrate.objective import LevelTables
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
WEIGHTS = torch.tensor([1.0, 2.2, 4.84, 23.4, 113.0])

INTERPRET = """
import sys, torch
from calibrate.column_kernel import sweep_columns
from calibrate.objective import LevelTables
results = []
for rule, descent, arguments in torch.load(sys.argv[1]):
    storage, values, *rest = arguments
    base = storage[:, 2:2 + values.shape[1]]
    codes, passed = sweep_columns(base, values, *rest, LevelTables.of(rule, base.device), descent)
    results.append((storage, values, codes, passed))
torch.save(results, sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """One call of the sweep."""

    rule: SliceRule
    descent: bool
    run: int
    n: int

    def arguments(self) -> list[torch.Tensor]:
        """Base, as rows 2 to run + 1 of a tensor [5, run + 3, n]; values; squares; scales; weights."""
        run, n, generator = self.run, self.n, torch.Generator().manual_seed(self.run * self.n)
        columns = torch.randn(run, n, generator=generator)
        inputs = torch.randn(5, 4 * run, run, generator=generator) + 0.5 * torch.randn(5, 4 * run, 1, generator=generator)
        hessians = (inputs.mT @ inputs / (4 * run)).double()
        values = columns + 0.1 * torch.randn(5, run, n, generator=generator)
        storage = torch.randn(5, run + 3, n, generator=generator)
        storage[:, 2 : 2 + run] = hessians.float() @ (columns - values) if self.descent else columns
        factors = torch.linalg.cholesky(torch.linalg.inv(hessians), upper=True)
        scales = columns.abs().amax(0).mul(torch.rand(n, generator=generator) * 0.3 + 0.75).div(128).expand(run, n).clone()
        scales[:, n // 2] = 0.0  # a group of zeros
        squares = (hessians if self.descent else factors).float()
        return [tensor.to(DEVICE) for tensor in (storage, values, squares, scales, WEIGHTS)]


CASES = [Case(rule, descent, 3, 7) for rule in SLICE_RULES for descent in (False, True)]
CASES += [Case("nested", False, 5, 35), Case("nested", True, 32, 7)]
if ON_GPU:
    CASES += [Case(rule, descent, 32, 131) for rule in SLICE_RULES for descent in (False, True)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]) -> dict[Case, tuple[torch.Tensor, ...]]:
    """What the kernel makes of each case: storage and values afterwards, codes, and what was passed on."""
    directory = tmp_path_factory.mktemp("kernel")
    torch.save([(case.rule, case.descent, case.arguments()) for case in CASES], directory / "cases.pt")
    run_kernels(INTERPRET, directory / "cases.pt", directory / "results.pt")
    return dict(zip(CASES, torch.load(directory / "results.pt"), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_chooses_the_codes_of_its_twin(case: Case, found: dict[Case, tuple[torch.Tensor, ...]]) -> None:
    storage, values, squares, scales, weights = case.arguments()
    kept = storage.clone()
    base = storage[:, 2 : 2 + case.run]
    codes, passed = sweep_columns(base, values, squares, scales, weights, LevelTables.of(case.rule, DEVICE), case.descent)
    found_storage, found_values, found_codes, found_passed = found[case]
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_values, values)
    # Sums over the columns before are taken in another order.
    torch.testing.assert_close(found_passed, passed, rtol=1e-4, atol=1e-5)
    assert torch.equal(found_storage, kept)
