import pytest
import torch

from calibrate.hessian import damped
from calibrate.objective import JointObjective
from calibrate.rounding import RoundingSettings, round_columns, round_layer, round_to_nearest
from calibrate.scales import search_scales
from matgptq_vllm.core.slicing import dequantize, expand_scales, levels, num_groups

WIDTHS = {2: 1.0, 3: 1.0, 4: 1.0, 6: 1.0, 8: 1.0}
COMPENSATION = {3: 1.0, 4: 2.0, 8: 1.0}
SHAPES = [(5, 40, 32), (17, 200, 64), (3, 300, 128), (7, 300, -1), (9, 129, 128)]
"""Outputs, inputs, group size: ragged last groups, ragged and several blocks of columns."""


def problem(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and a Hessian [K, K] of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(n * k)
    inputs = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator).mul_(0.3 / k**0.5).add_(
        torch.eye(k)
    )
    inputs += torch.randn(4 * k, 1, generator=generator)
    return torch.randn(n, k, generator=generator), inputs.t() @ inputs / (4 * k)


def settings(group_size: int, act_order: bool = False) -> RoundingSettings:
    return RoundingSettings(group_size, torch.bfloat16, 0.01, act_order)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weight - rounded
    return float(((error @ hessian) * error).sum())


def oracle(weight: torch.Tensor, hessian: torch.Tensor, rule: str, group_size: int) -> torch.Tensor:
    """Codes by eliminating one input after the other from the whole inverse Hessian, in float64, without any factor.

    Scales come from the search, each group's at the moment its first column is reached.
    """
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    objective = JointObjective(rule, WIDTHS, COMPENSATION)
    rest, h = weight.double().clone(), damped(hessian, 0.01).double()
    inverse = torch.linalg.inv(h)
    codes = torch.empty(n, k, dtype=torch.uint8)
    total = sum(COMPENSATION.values())
    for j in range(k):
        if j % size == 0:
            part = slice(j, j + size)
            scale = search_scales(rest[:, part].t().float(), h.diagonal()[part].float(), objective, torch.bfloat16).double()
        codes[:, j] = objective.choose((rest[:, j] / scale).float())
        value = sum(share / total * levels(codes[:, j], r, rule, torch.float64) for r, share in COMPENSATION.items()) * scale
        rest -= ((rest[:, j] - value) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_codes_are_those_of_plain_elimination_in_float64(n, k, group_size, rule):
    weight, hessian = problem(n, k)
    codes, scales = round_layer(weight, hessian, [JointObjective(rule, WIDTHS, COMPENSATION)], settings(group_size), "layer")
    assert codes.shape == (n, k)
    assert scales.shape == (n, num_groups(k, group_size))
    assert scales.dtype == torch.bfloat16
    # Arithmetic in float32 moves a few weights that lie on a threshold; a wrong formula moves most.
    expected = oracle(weight, hessian, rule, group_size)
    assert ((codes.int() - expected.int()).abs() <= 1).float().mean() > 0.99


def test_the_loop_in_float64_agrees_exactly_with_elimination_where_scales_are_given():
    weight, hessian = problem(6, 150)
    scale = (weight.abs().amax(1) / 128).bfloat16().double()
    objective = JointObjective("nested", {8: 1.0}, {8: 1.0})
    h = damped(hessian, 0.01).double()
    inverse = torch.linalg.inv(h)
    rest, expected = weight.double().clone(), torch.empty(6, 150, dtype=torch.uint8)
    for j in range(150):
        expected[:, j] = objective.choose(rest[:, j] / scale)
        error = (rest[:, j] - levels(expected[:, j], 8, "nested", torch.float64) * scale) / inverse[j, j]
        rest -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = round_columns(weight.double().t().contiguous(), factor, lambda _: scale, objective)
    assert torch.equal(codes.t(), expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_the_width_made_up_for_has_less_output_error_than_rounding_to_nearest(n, k, group_size, rule, act_order):
    weight, hessian = problem(n, k)
    for width in (2, 3, 4, 8):
        objective = JointObjective(rule, {width: 1.0}, {width: 1.0})
        ours = round_layer(weight, hessian, [objective], settings(group_size, act_order), "layer")
        nearest = round_to_nearest(weight, objective, group_size, torch.bfloat16)
        errors = [
            output_error(weight, dequantize(codes, scales.float(), width, rule, group_size), hessian)
            for codes, scales in (ours, nearest)
        ]
        assert errors[0] < 0.7 * errors[1]


def test_act_order_gives_the_codes_back_in_the_order_of_the_inputs():
    weight, hessian = problem(4, 90)
    hessian = hessian + torch.diag(torch.linspace(0.0, 5.0, 90))
    objective = JointObjective("nested", WIDTHS, COMPENSATION)
    codes, scales = round_layer(weight, hessian, [objective], settings(-1, act_order=True), "layer")
    shuffle = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    shuffled_codes, shuffled_scales = round_layer(
        weight[:, shuffle], hessian[shuffle][:, shuffle], [objective], settings(-1, act_order=True), "layer"
    )
    assert torch.equal(scales, shuffled_scales)
    assert torch.equal(codes[:, shuffle], shuffled_codes)
    assert not torch.equal(codes, round_layer(weight, hessian, [objective], settings(-1), "layer")[0])


def test_without_correlation_every_code_is_the_nearest_to_its_weight():
    weight, _ = problem(6, 72)
    objective = JointObjective("nested", WIDTHS, COMPENSATION)
    codes, scales = round_layer(weight, torch.eye(72), [objective], settings(32), "layer")
    scaled = weight / expand_scales(scales.float(), 72, 32)
    assert torch.equal(codes, objective.choose(scaled))


def test_stacked_layers_get_the_codes_that_each_gets_alone():
    weight, hessian = problem(12, 100)
    objective = JointObjective("round", WIDTHS, COMPENSATION)
    together = round_layer(weight, hessian, [objective], settings(32), "layer")
    parts = [round_layer(part, hessian, [objective], settings(32), "layer") for part in weight.split([5, 7])]
    differing = (together[0] != torch.cat([codes for codes, _ in parts])).float().mean()
    assert differing < 0.01  # matrix products of another shape may sum in another order


def test_inputs_never_seen_are_rounded_to_nearest_and_disturb_nobody():
    weight, hessian = problem(5, 64)
    dead = [3, 40]
    hessian[dead] = 0
    hessian[:, dead] = 0
    objective = JointObjective("nested", WIDTHS, COMPENSATION)
    codes, scales = round_layer(weight, hessian, [objective], settings(32), "layer")
    scaled = weight / expand_scales(scales.float(), 64, 32)
    assert torch.equal(codes[:, dead], objective.choose(scaled)[:, dead])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rule", ["nested", "round"])
def test_weights_of_zero_stay_exactly_zero_at_every_width(rule, act_order):
    _, hessian = problem(4, 40)
    objective = JointObjective(rule, WIDTHS, COMPENSATION)
    codes, scales = round_layer(torch.zeros(4, 40), hessian, [objective], settings(32, act_order), "layer")
    for width in WIDTHS:
        assert torch.equal(dequantize(codes, scales, width, rule, 32), torch.zeros(4, 40))


def test_the_weight_is_not_written_to():
    weight, hessian = problem(1, 40)
    before = weight.clone()
    round_layer(weight, hessian, [JointObjective("nested", WIDTHS, COMPENSATION)], settings(32), "layer")
    assert torch.equal(weight, before)


def test_nearest_rounding_is_within_half_a_step_with_a_ragged_last_group():
    weight, _ = problem(8, 70)
    codes, scales = round_to_nearest(weight, JointObjective("nested", {8: 1.0}, {8: 1.0}), 32, torch.float32)
    step = expand_scales(scales, 70, 32)
    assert scales.shape == (8, 3)
    assert ((weight - dequantize(codes, scales, 8, "nested", 32)).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rule", ["nested", "round"])
def test_a_second_stage_keeps_the_narrow_slices_and_improves_the_wide_ones(rule, act_order):
    weight, hessian = problem(11, 200)
    narrow, wide = JointObjective(rule, WIDTHS, {3: 1.0}), JointObjective(rule, WIDTHS, {8: 1.0})
    first, scales = round_layer(weight, hessian, [narrow], settings(64, act_order), "layer")
    both, same_scales = round_layer(weight, hessian, [narrow, wide], settings(64, act_order), "layer")
    assert torch.equal(scales, same_scales)
    for width in (2, 3):
        assert torch.equal(levels(first, width, rule), levels(both, width, rule))
    errors = [output_error(weight, dequantize(codes, scales.float(), 8, rule, 64), hessian) for codes in (first, both)]
    assert errors[1] < 0.5 * errors[0]
