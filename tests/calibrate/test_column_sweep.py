"""calibrate.column_sweep against both passes written out in float64 without any factor, block or level table."""

from itertools import pairwise

import pytest
import torch

from calibrate.column_sweep import sweep_columns
from calibrate.objective import LevelTables
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels, nearest_codes

every_rule = pytest.mark.parametrize("rule", SLICE_RULES)
ALL_CODES = torch.arange(256).to(torch.uint8)
WEIGHTS = torch.tensor([1.0, 2.2, 4.84, 23.4, 113.0])
RUN, N = 13, 7


def hessians_of(run: int) -> torch.Tensor:
    """A Hessian of correlated inputs for every width, float64 [5, run, run]."""
    generator = torch.Generator().manual_seed(run)
    found = []
    for _ in WIDTHS:
        inputs = torch.randn(6 * run, run, generator=generator, dtype=torch.float64)
        inputs += 0.5 * torch.randn(6 * run, 1, generator=generator, dtype=torch.float64)
        found.append(inputs.t() @ inputs / (6 * run))
    return torch.stack(found)


def inverse_factors(hessians: torch.Tensor) -> torch.Tensor:
    """Upper U with U^T U = H^-1, float32 [5, run, run]."""
    return torch.linalg.cholesky(torch.linalg.inv(hessians), upper=True).float()


def problem(run: int = RUN, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns of weights [run, N], scales [run, N] at which a few clip, and Hessians float64 [5, run, run]."""
    generator = torch.Generator().manual_seed(run * n)
    columns = torch.randn(run, n, generator=generator)
    scales = columns.abs().amax(0).mul(torch.rand(n, generator=generator) * 0.3 + 0.75).div(128).expand(run, n)
    return columns, scales.contiguous(), hessians_of(run)


def values_of(codes: torch.Tensor, scales: torch.Tensor, rule: SliceRule) -> torch.Tensor:
    """float64 [5, ...] of codes [...]."""
    return torch.stack([levels(codes, width, rule, torch.float64) * scales.double() for width in WIDTHS])


def losses_of_all_codes(targets: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, rule: SliceRule) -> torch.Tensor:
    """The joint objective of each code for targets [5, N], importance [5] and scales [N]: float64 [256, N]."""
    values = values_of(ALL_CODES[:, None], scale[None], rule)  # [5, 256, N]
    return (importance[:, None, None] * (targets[:, None] - values).square()).sum(0)


def check_choices(codes: torch.Tensor, losses: list[torch.Tensor]) -> None:
    """Codes [run, N] are the best of all 256 by the losses of their columns, [256, N] each, but for what candidates miss.

    ``choose`` (see test_objective) does not try codes between two far bins of 6 bits that two targets ask for.
    """
    stacked = torch.stack(losses)  # [run, 256, N]
    best = stacked.min(1).values
    found = stacked.gather(1, codes.long()[:, None])[:, 0]
    assert (found <= best * (1 + 1e-3)).double().mean() >= 0.93
    assert found.sum() <= 1.01 * best.sum()


@every_rule
def test_the_column_pass_is_gptq_of_all_widths_at_once(rule: SliceRule) -> None:
    columns, scales, hessians = problem()
    base, values = columns.expand(5, RUN, N).clone(), torch.full((5, RUN, N), torch.nan)
    factors = inverse_factors(hessians)
    codes, passed = sweep_columns(base, values, factors, scales, WEIGHTS, LevelTables.of(rule, base.device), False)
    # Every width eliminates one input after the other from the whole inverse Hessian; the codes found decide what it leaves.
    rest, inverses = base.double(), torch.linalg.inv(hessians)
    found, losses = values_of(codes, scales, rule), []
    for j in range(RUN):
        pivots = inverses[:, j, j]
        losses.append(losses_of_all_codes(rest[:, j], WEIGHTS.double() / pivots, scales[j], rule))
        error = (rest[:, j] - found[:, j]) / pivots[:, None]  # [5, N]
        torch.testing.assert_close(passed[:, j].double(), error * pivots[:, None].sqrt(), rtol=1e-3, atol=1e-4)
        rest = rest - inverses[:, :, j, None] * error[:, None]
        inverses = inverses - inverses[:, :, j, None] * inverses[:, j, None] / pivots[:, None, None]
    check_choices(codes, losses)


@every_rule
def test_the_descent_pass_moves_every_column_to_the_best_code_given_the_others(rule: SliceRule) -> None:
    columns, scales, hessians = problem()
    start = nearest_codes(columns / scales, rule)
    before = values_of(start, scales, rule)
    gradient = hessians @ (columns.double() - before)
    values = before.float()
    codes, passed = sweep_columns(
        gradient.float(), values, hessians.float(), scales, WEIGHTS, LevelTables.of(rule, columns.device), True
    )
    now, found, losses = before.clone(), values_of(codes, scales, rule), []
    for j in range(RUN):
        curvature = hessians[:, j, j]
        target = now[:, j] + (hessians[:, j, None] @ (columns.double() - now))[:, 0] / curvature[:, None]
        losses.append(losses_of_all_codes(target, WEIGHTS.double() * curvature, scales[j], rule))
        torch.testing.assert_close(passed[:, j].double(), found[:, j] - now[:, j], rtol=1e-4, atol=1e-5)
        now[:, j] = found[:, j]
    check_choices(codes, losses)


@every_rule
@pytest.mark.parametrize("descent", [False, True])
def test_values_are_left_as_those_of_the_codes(rule: SliceRule, descent: bool) -> None:
    columns, scales, hessians = problem()
    base = columns.expand(5, RUN, N).clone()
    values = base.clone()
    squares = hessians.float() if descent else inverse_factors(hessians)
    codes, passed = sweep_columns(base, values, squares, scales, WEIGHTS, LevelTables.of(rule, base.device), descent)
    assert codes.dtype == torch.uint8
    assert codes.shape == (RUN, N)
    assert passed.shape == (5, RUN, N)
    assert torch.equal(values, torch.stack([levels(codes, width, rule) * scales for width in WIDTHS]))
    assert torch.equal(base, columns.expand(5, RUN, N))


@every_rule
@pytest.mark.parametrize("width", WIDTHS)
def test_for_one_width_the_column_pass_is_plain_gptq(rule: SliceRule, width: int) -> None:
    columns, scales, hessians = problem()
    row = WIDTHS.index(width)
    weights = torch.full((5,), 1e-12)
    weights[row] = 1.0
    base = columns.expand(5, RUN, N).clone()
    values = torch.empty_like(base)
    sweep_columns(base, values, inverse_factors(hessians), scales, weights, LevelTables.of(rule, base.device), False)
    # Plain GPTQ: the level nearest to what is left of the weight, its error passed on by the inverse Hessian.
    rest, inverse = columns.double(), torch.linalg.inv(hessians[row])
    held = levels(ALL_CODES, width, rule, torch.float64)
    for j in range(RUN):
        scale = scales[j].double()
        if rule == "curved" and width > 4:
            nearest = levels(nearest_codes(rest[j] / scale, rule), width, rule, torch.float64) * scale  # that of the bin
        else:
            nearest = held[(rest[j] - held[:, None] * scale).abs().argmin(0)] * scale
        torch.testing.assert_close(values[row, j].double(), nearest, rtol=1e-5, atol=1e-6)
        rest = rest - inverse[:, j, None] * ((rest[j] - nearest) / inverse[j, j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


@every_rule
def test_descent_lowers_the_joint_squared_error_and_that_of_no_output_rises_by_a_hundredth(rule: SliceRule) -> None:
    columns, scales, hessians = problem(29, 23)
    tables = LevelTables.of(rule, columns.device)
    targets = columns.expand(5, 29, 23).clone()
    values = torch.empty_like(targets)
    sweep_columns(targets, values, inverse_factors(hessians), scales, WEIGHTS, tables, False)

    def joint() -> torch.Tensor:
        error = columns.double() - values.double()
        return (WEIGHTS.double()[:, None] * (error * (hessians @ error)).sum(1)).sum(0)  # [N]

    trail = [joint()]
    for _ in range(4):
        gradient = (hessians @ (columns.double() - values.double())).float()
        sweep_columns(gradient, values, hessians.float(), scales, WEIGHTS, tables, True)
        trail.append(joint())
    for before, after in pairwise(trail):
        assert after.sum() < before.sum()
        assert (after <= before * 1.01).all()
    assert trail[-1].sum() < 0.96 * trail[0].sum()


@every_rule
@pytest.mark.parametrize("descent", [False, True])
def test_a_scale_of_zero_gives_values_of_zero_and_no_nan(rule: SliceRule, descent: bool) -> None:
    columns, scales, hessians = problem()
    columns[:, 2], scales[:, 2] = 0.0, 0.0
    values = torch.zeros(5, RUN, N)
    squares = hessians.float() if descent else inverse_factors(hessians)
    base = columns.expand(5, RUN, N).clone()
    _, passed = sweep_columns(base, values, squares, scales, WEIGHTS, LevelTables.of(rule, base.device), descent)
    assert values[:, :, 2].eq(0).all()
    assert passed[:, :, 2].eq(0).all()
    assert passed.isfinite().all()


def test_a_run_of_one_column_passes_nothing_to_itself() -> None:
    columns, scales, _ = problem(1, 3)
    values = torch.empty(5, 1, 3)
    tables = LevelTables.of("nested", columns.device)
    codes, _ = sweep_columns(
        columns.expand(5, 1, 3).clone(), values, torch.full((5, 1, 1), 2.0), scales, WEIGHTS, tables, False
    )
    assert torch.equal(codes, nearest_codes(columns / scales, "nested"))
