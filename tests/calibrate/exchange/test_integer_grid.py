import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.exchange.integer_grid import fit_exactly, fit_nearest


def relative_error(values, reference):
    return float((values - reference).square().sum() / reference.square().sum())


@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([4, 8]),
    n=st.integers(1, 7),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([2, 32, 40]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_values_on_a_grid_are_represented_bit_for_bit(seed, bits, n, groups, group_size, dtype):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    spread = int(torch.randint(1, half + 1, (1,), generator=generator))
    levels = torch.randint(-spread, spread, (n, groups, group_size), generator=generator)
    scales = (torch.rand(n, groups, 1, generator=generator) + 0.01).mul(0.01).to(dtype)
    values = (levels * scales.float()).view(n, groups * group_size)
    fit = fit_exactly(values, group_size, bits, dtype)
    assert fit is not None
    assert torch.equal(fit.values(), values)
    assert (fit.codes.dtype, fit.scales.dtype, fit.scales.shape) == (torch.uint8, dtype, (n, groups))
    assert set(fit.zeros.unique().tolist()) == {half}


def test_only_values_on_a_grid_are_exact():
    step = torch.full((1, 16), 0.5)
    assert fit_exactly(torch.arange(-8, 8).float().view(1, 16), 16, 4, torch.bfloat16) is not None
    assert fit_exactly(torch.arange(-8, 8).float().view(1, 16) + step, 16, 4, torch.bfloat16) is None
    # 15 steps of a half above zero: five bits, which eight hold.
    assert fit_exactly(torch.arange(-8, 8).float().view(1, 16) + step, 16, 8, torch.bfloat16) is not None
    # The scale would be 1/3, which bfloat16 does not hold.
    assert fit_exactly(torch.arange(-8, 8).float().view(1, 16) / 3, 16, 4, torch.bfloat16) is None
    # One group of many off the grid is enough.
    many = torch.arange(-8, 8).float().repeat(5, 3)
    many[4, 40] += 0.25
    assert fit_exactly(many, 16, 4, torch.bfloat16) is None


def test_groups_of_zeros_are_exact_and_finite():
    values = torch.zeros(3, 64)
    values[1, 32:] = torch.arange(-16, 16) * 0.5
    fit = fit_exactly(values, 32, 8, torch.float16)
    assert torch.equal(fit.values(), values)
    nearest = fit_nearest(values, 32, 4, torch.float16, zero_points=True)
    assert bool(nearest.scales.isfinite().all())
    assert torch.equal(nearest.values()[0], torch.zeros(64))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 32, 32), (7, 96, 32), (17, 40, 40)])
def test_the_nearest_fit_beats_rounding_at_the_full_range(zero_points, n, k, group_size):
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) * 0.02 + 0.004
    fit = fit_nearest(values, group_size, 4, torch.bfloat16, zero_points)
    groups = values.view(n, -1, group_size)
    scales = groups.abs().amax(2, keepdim=True) / 7.5
    plain = ((groups / scales).round().clamp(-8, 7) * scales).view(n, k)
    assert relative_error(fit.values(), values) < relative_error(plain, values)
    assert int(fit.codes.max()) < 16
    assert (fit.scales.dtype, fit.zeros.shape) == (torch.bfloat16, fit.scales.shape)


def test_zero_points_help_where_groups_lean_to_one_side():
    values = torch.rand(9, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    symmetric = fit_nearest(values, 32, 4, torch.bfloat16)
    leaning = fit_nearest(values, 32, 4, torch.bfloat16, zero_points=True)
    assert relative_error(leaning.values(), values) < 0.3 * relative_error(symmetric.values(), values)
    assert set(symmetric.zeros.unique().tolist()) == {8}


def test_half_steps_cost_less_than_half_a_step_everywhere():
    levels = torch.randn(11, 128, generator=torch.Generator().manual_seed(2)).mul(2.7).sub(0.5).round().clamp(-8, 7) + 0.5
    fit = fit_nearest(levels, 128, 4, torch.bfloat16)
    assert float((fit.values() - levels).square().mean()) < 0.25


def test_a_layer_larger_than_a_chunk_is_fitted_like_its_rows(monkeypatch):
    values = torch.randn(13, 64, generator=torch.Generator().manual_seed(3))
    whole = fit_nearest(values, 32, 4, torch.float16, zero_points=True).values()
    exact = (values * 4).round().clamp(-8, 7)
    monkeypatch.setattr("calibrate.exchange.integer_grid.ELEMENTS_PER_CHUNK", 200)
    assert torch.equal(fit_nearest(values, 32, 4, torch.float16, zero_points=True).values(), whole)
    assert torch.equal(fit_exactly(exact, 32, 4, torch.float16).values(), exact)
