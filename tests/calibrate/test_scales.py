"""calibrate.scales: full range and clipped group scales."""

import pytest
import torch

from calibrate.scales import CLIPS, divisor, full_range_scales, half_range, search_scales
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels, nearest_codes

every_rule = pytest.mark.parametrize("rule", SLICE_RULES)
EQUAL = torch.ones(5)


def columns_of(k: int, n: int) -> torch.Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(k * n))


def importance_of(k: int) -> torch.Tensor:
    """Uneven over inputs and over widths, float32 [5, K]."""
    return torch.rand(5, k, generator=torch.Generator().manual_seed(k)) ** 4


def loss_of(
    group: torch.Tensor, importance: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, rule: SliceRule
) -> torch.Tensor:
    """The joint squared error of the nearest codes of a group [k, N], by the definition: float64 [N]."""
    codes = nearest_codes(group / scales, rule)
    total = torch.zeros(group.shape[1], dtype=torch.float64)
    for row, width in enumerate(WIDTHS):
        error = group.double() - scales.double() * levels(codes, width, rule, torch.float64)
        total += weights[row].double() * (importance[row].double()[:, None] * error.square()).sum(0)
    return total


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_exact_in_the_stored_type(rule: SliceRule, dtype: torch.dtype) -> None:
    columns = columns_of(32, 17)
    for scales in (
        full_range_scales(columns, rule, dtype),
        search_scales(columns, importance_of(32), EQUAL, rule, 32, dtype)[0],
    ):
        assert scales.dtype == torch.float32
        assert torch.equal(scales, scales.to(dtype).float())
        assert (scales > 0).all()


@every_rule
def test_at_full_range_no_weight_is_further_than_half_a_step_from_its_level(rule: SliceRule) -> None:
    columns = columns_of(64, 9)
    scaled = columns / full_range_scales(columns, rule, torch.float32)
    error = (scaled - levels(nearest_codes(scaled, rule), 8, rule)).abs()
    # A bent step is up to 2 wide.
    assert error.max() <= 0.5 * (2.0 if rule == "curved" else 1.0) + 1e-4
    assert scaled.abs().amax(0).sub(half_range(rule)).abs().max() < 1e-4


def test_a_group_of_zeros_gets_scale_zero_and_divides_to_no_nan() -> None:
    columns = torch.zeros(8, 3)
    columns[2, 1] = 1.0
    for rule in SLICE_RULES:
        for scales in (
            full_range_scales(columns, rule, torch.bfloat16),
            search_scales(columns, torch.ones(5, 8), EQUAL, rule, 32, torch.bfloat16)[0],
        ):
            assert scales[0] == 0
            assert scales[2] == 0
            assert scales[1] > 0
            assert torch.isfinite(columns / divisor(scales)).all()


@every_rule
@pytest.mark.parametrize(("k", "n", "group_size"), [(32, 5, 32), (40, 13, 32), (72, 3, 64), (130, 7, 128), (130, 7, -1)])
def test_every_group_gets_the_best_of_the_clipped_ranges_by_the_joint_objective(
    rule: SliceRule, k: int, n: int, group_size: int
) -> None:
    columns, importance = columns_of(k, n), importance_of(k)
    weights = torch.tensor([1.0, 2.2, 4.84, 23.4, 113.0])
    found = search_scales(columns, importance, weights, rule, group_size, torch.bfloat16)
    size = k if group_size == -1 else group_size
    assert found.shape == (-(-k // size), n)
    for group, scales in enumerate(found):
        part = slice(group * size, (group + 1) * size)
        largest = columns[part].abs().amax(0) / half_range(rule)
        losses = torch.stack(
            [loss_of(columns[part], importance[:, part], weights, (largest * clip).bfloat16().float(), rule) for clip in CLIPS]
        )
        of_found = loss_of(columns[part], importance[:, part], weights, scales, rule)
        torch.testing.assert_close(of_found, losses.min(0).values, rtol=1e-4, atol=0.0)


@every_rule
def test_an_unimportant_outlier_is_clipped_and_an_important_one_is_not(rule: SliceRule) -> None:
    columns = torch.full((16, 1), 0.25 if rule == "round" else 0.1)  # ``round`` has a level 0 for the smallest anyway
    columns[5] = 1.0
    narrow = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    ignored, needed = torch.ones(5, 16), torch.ones(5, 16)
    ignored[:, 5], needed[:, 5] = 0.0, 1e6
    clipped = search_scales(columns, ignored, narrow, rule, 32, torch.bfloat16)
    kept = search_scales(columns, needed, narrow, rule, 32, torch.bfloat16)
    assert clipped.item() < 0.8 * kept.item()


def test_only_the_importance_of_a_width_that_counts_matters() -> None:
    columns, importance = columns_of(32, 6), importance_of(32)
    eight = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    changed = importance.clone()
    changed[:4] = 1e3
    found = [search_scales(columns, given, eight, "curved", 32, torch.bfloat16) for given in (importance, changed)]
    assert torch.equal(*found)
