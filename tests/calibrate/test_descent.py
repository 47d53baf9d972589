import pytest
import torch

from calibrate.descent import descend
from calibrate.objective import JointObjective, bounds_of
from matgptq_vllm.core.slicing import levels


def problem(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [K, N], a Hessian [K, K] of correlated inputs and scales [K, N]."""
    generator = torch.Generator().manual_seed(k)
    inputs = torch.randn(3 * k, k, generator=generator) + torch.randn(3 * k, 1, generator=generator)
    columns = torch.randn(k, n, generator=generator)
    return columns, inputs.t() @ inputs / (3 * k), (columns.abs().amax(0) / 128).expand(k, n)


def energy(columns, codes, hessian, scales, width, rule) -> torch.Tensor:
    """Squared output error of every output, [N]."""
    error = columns - levels(codes, width, rule) * scales
    return (error * (hessian @ error)).sum(0)


@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize("width", [4, 6, 8])
def test_no_output_gets_worse_and_most_get_better_within_the_bounds(width, rule):
    columns, hessian, scales = problem(37, 11)
    objective = JointObjective(rule, {width: 1.0}, {width: 1.0})
    start = objective.choose(columns / scales)
    bounds = bounds_of(start, 2, rule)
    codes = descend(columns, start, hessian, lambda column: scales[column], objective, bounds, 3)
    assert ((bounds[0] <= codes) & (codes <= bounds[1])).all()
    before, after = (energy(columns, state, hessian, scales, width, rule) for state in (start, codes))
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.9 * before.sum()


def test_where_it_ends_no_single_code_can_be_bettered():
    columns, hessian, scales = problem(9, 3)
    objective = JointObjective("nested", {4: 1.0}, {4: 1.0})
    start = objective.choose(columns / scales)
    bounds = bounds_of(start, 2, "nested")
    codes = descend(columns, start, hessian, lambda column: scales[column], objective, bounds, 50)
    best = energy(columns, codes, hessian, scales, 4, "nested")
    for column in range(9):
        for step in range(64):
            changed = codes.clone()
            changed[column] = (bounds[0][column].int() + step).clamp(max=bounds[1][column].int()).to(torch.uint8)
            assert (energy(columns, changed, hessian, scales, 4, "nested") >= best * 0.9999).all()


def test_weights_of_zero_and_inputs_without_curvature_change_nothing():
    columns, hessian, _ = problem(8, 2)
    objective = JointObjective("nested", {8: 1.0}, {8: 1.0})
    start = torch.full((8, 2), 128, dtype=torch.uint8)
    bounds = bounds_of(start, 2, "nested")
    still = descend(torch.zeros(8, 2), start, hessian, lambda _: torch.zeros(2), objective, bounds, 2)
    assert (still * torch.zeros(2)).isfinite().all()
    flat = descend(columns, start, torch.zeros(8, 8), lambda _: torch.ones(2), objective, bounds, 2)
    assert torch.equal(flat, start)
