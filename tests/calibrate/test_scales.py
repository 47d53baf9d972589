import pytest
import torch

from calibrate.objective import JointObjective
from calibrate.scales import divisor, full_range_scales, search_scales, static_scales
from matgptq_vllm.core.slicing import levels

WIDTHS = {2: 1.0, 4: 1.0, 8: 1.0}


def weights(inputs: int, outputs: int) -> torch.Tensor:
    return torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["nested", "round"])
def test_scales_are_exact_in_the_stored_type(rule, dtype):
    group = weights(32, 17)
    objective = JointObjective(rule, WIDTHS, WIDTHS)
    for scales in (full_range_scales(group, rule, dtype), search_scales(group, torch.ones(32), objective, dtype)):
        assert torch.equal(scales, scales.to(dtype).float())
        assert (scales > 0).all()


@pytest.mark.parametrize("rule", ["nested", "round"])
def test_at_full_range_no_weight_is_further_than_half_a_step_from_its_code(rule):
    group = weights(64, 9)
    scales = full_range_scales(group, rule, torch.float32)
    scaled = group / scales
    nearest = levels(JointObjective(rule, {8: 1.0}, {8: 1.0}).choose(scaled), 8, rule)
    assert (scaled - nearest).abs().max() <= 0.5 + 1e-4


def test_a_group_of_zeros_gets_scale_zero_and_divides_to_no_nan():
    group = torch.zeros(8, 3)
    group[2, 1] = 1.0
    objective = JointObjective("nested", WIDTHS, WIDTHS)
    for scales in (
        full_range_scales(group, "nested", torch.bfloat16),
        search_scales(group, torch.ones(8), objective, torch.bfloat16),
    ):
        assert scales[0] == 0
        assert scales[2] == 0
        assert scales[1] > 0
        assert torch.isfinite(group / divisor(scales)).all()


def loss_of(group: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, objective: JointObjective) -> torch.Tensor:
    """Weighted squared error over widths by the definition, [N]."""
    codes = objective.choose(group / scales)
    errors = [(group - scales * levels(codes, width, objective.rule)) ** 2 for width in WIDTHS]
    return (importance[:, None] * sum(errors)).sum(0)


@pytest.mark.parametrize("rule", ["nested", "round"])
def test_the_search_finds_the_best_of_its_grid_by_the_joint_objective(rule):
    group, importance = weights(40, 13), torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 4
    objective = JointObjective(rule, WIDTHS, WIDTHS)
    clips = (1.0, 0.8, 0.6, 0.4)
    found = loss_of(group, importance, search_scales(group, importance, objective, torch.bfloat16, clips), objective)
    half = 128.0 if rule == "nested" else 127.5
    candidates = [(group.abs().amax(0) * clip / half).bfloat16().float() for clip in clips]
    best = torch.stack([loss_of(group, importance, scales, objective) for scales in candidates]).min(0).values
    torch.testing.assert_close(found, best, rtol=1e-4, atol=0)


def test_an_unimportant_outlier_is_clipped_and_an_important_one_is_not():
    group = torch.full((16, 1), 0.1)
    group[5] = 1.0
    objective = JointObjective("nested", {2: 1.0}, {2: 1.0})
    ignored, needed = torch.ones(16), torch.ones(16)
    ignored[5], needed[5] = 0.0, 1e6
    clipped = search_scales(group, ignored, objective, torch.bfloat16)
    kept = search_scales(group, needed, objective, torch.bfloat16)
    assert clipped < 0.7 * kept


def test_static_scales_cover_a_ragged_last_group_and_per_channel():
    columns, importance = weights(72, 5), torch.ones(72)
    objective = JointObjective("nested", WIDTHS, WIDTHS)
    scales = static_scales(columns, importance, objective, 32, torch.bfloat16)
    assert scales.shape == (3, 5)
    assert torch.equal(scales[2], search_scales(columns[64:], importance[64:], objective, torch.bfloat16))
    assert static_scales(columns, importance, objective, -1, torch.bfloat16).shape == (1, 5)
