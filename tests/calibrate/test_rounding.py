"""calibrate.rounding: whole layers, in every layout, against direct computation and rounding to nearest."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from calibrate import rounding
from calibrate.objective import LevelTables, choose
from calibrate.rounding import RoundingSettings, round_to_nearest
from calibrate.statistics import InputStatistics
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, dequantize, expand_scales, levels, nearest_codes, num_groups

every_rule = pytest.mark.parametrize("rule", SLICE_RULES)
WEIGHTS = {2: 1.0, 3: 2.2, 4: 4.84, 6: 23.4, 8: 113.0}
SHAPES = [(5, 40, 32), (9, 75, 64), (3, 150, 128), (7, 140, -1), (2, 129, 128)]
"""Outputs, inputs, group size: ragged last groups, ragged and several runs and blocks of columns."""


def round_layers(
    weight: torch.Tensor, statistics: Mapping[int | None, InputStatistics], settings: RoundingSettings, name: str
) -> rounding.RoundedWeights:
    """As in ``rounding``, on copies of the statistics, which it overwrites."""
    return rounding.round_layers(weight, copy.deepcopy(statistics), settings, name)


def inputs_of(k: int) -> torch.Tensor:
    """Strongly correlated inputs [4 K, K]."""
    generator = torch.Generator().manual_seed(k)
    mixing = torch.eye(k) + torch.randn(k, k, generator=generator) * (0.3 / k**0.5)
    return torch.randn(4 * k, k, generator=generator) @ mixing + torch.randn(4 * k, 1, generator=generator)


def weight_of(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))


def mean_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.t() @ right / left.shape[0]


def original(inputs: torch.Tensor) -> dict[int | None, InputStatistics]:
    """Statistics of the original stream alone."""
    return {None: InputStatistics(mean_product(inputs, inputs), None, len(inputs))}


def settings(
    rule: SliceRule = "nested", group_size: int = 32, weights: Mapping[int, float] = WEIGHTS, **changes: object
) -> RoundingSettings:
    return replace(RoundingSettings(rule, group_size, torch.bfloat16, weights, sweeps=1), **changes)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    """Mean over tokens of the squared error of all outputs."""
    return float(((weight - rounded).double() @ inputs.double().t()).square().sum() / len(inputs))


@every_rule
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_narrow_widths_and_the_sum_of_all_have_less_output_error_than_rounding_to_nearest(
    n: int, k: int, group_size: int, rule: SliceRule
) -> None:
    weight, inputs = weight_of(n, k), inputs_of(k)
    found = round_layers(weight, original(inputs), settings(rule, group_size), "layer")
    assert (found.codes.shape, found.codes.dtype) == ((n, k), torch.uint8)
    assert (found.scales.shape, found.scales.dtype) == ((n, num_groups(k, group_size)), torch.bfloat16)
    assert found.codes.is_contiguous()
    nearest = round_to_nearest(weight, rule, group_size, torch.bfloat16)
    ours, theirs = (
        {width: output_error(weight, dequantize(*parent, width, rule, group_size), inputs) for width in WIDTHS}
        for parent in ((found.codes, found.scales), nearest)
    )
    for width in (2, 3, 4):
        assert ours[width] < 0.95 * theirs[width]
    assert sum(WEIGHTS[width] * ours[width] for width in WIDTHS) < 0.8 * sum(WEIGHTS[width] * theirs[width] for width in WIDTHS)


@every_rule
@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_alone_is_much_better_than_rounding_to_nearest(rule: SliceRule, width: int) -> None:
    weight, inputs = weight_of(11, 100), inputs_of(100)
    found = round_layers(weight, original(inputs), settings(rule, 64, {width: 1.0}), "layer")
    nearest = round_to_nearest(weight, rule, 64, torch.bfloat16)
    errors = [
        output_error(weight, dequantize(*parent, width, rule, 64), inputs) for parent in ((found.codes, found.scales), nearest)
    ]
    assert errors[0] < 0.7 * errors[1]


@every_rule
def test_sweeps_of_descent_lower_the_joint_error(rule: SliceRule) -> None:
    weight, inputs = weight_of(11, 100), inputs_of(100)
    joint = []
    for sweeps in (0, 1, 4):
        found = round_layers(weight, original(inputs), settings(rule, 64, sweeps=sweeps), "layer")
        joint.append(sum(WEIGHTS[width] * found.squared_errors[row].sum().item() for row, width in enumerate(WIDTHS)))
    assert joint[1] < joint[0]
    assert joint[2] < joint[1]


@pytest.mark.parametrize(
    ("rule", "n", "k", "group_size"), [("nested", *SHAPES[0]), ("curved", *SHAPES[1]), ("round", *SHAPES[3])]
)
def test_errors_are_those_of_the_codes_on_the_inputs_of_each_widths_stream(
    n: int, k: int, group_size: int, rule: SliceRule
) -> None:
    weight, inputs = weight_of(n, k), inputs_of(k)
    moved = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    statistics = original(inputs) | {3: InputStatistics(mean_product(moved, moved), mean_product(moved, inputs), len(inputs))}
    found = round_layers(weight, statistics, settings(rule, group_size), "layer")
    assert found.squared_errors.shape == found.squared_outputs.shape == (5, n)
    for row, width in enumerate(WIDTHS):
        hessian = statistics[3 if width == 3 else None].hessian.double()
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        error = (weight - dequantize(found.codes, found.scales, width, rule, group_size)).double()
        for stated, of in ((found.squared_errors, error), (found.squared_outputs, weight.double())):
            torch.testing.assert_close(stated[row].double(), ((of @ hessian) * of).sum(1), rtol=1e-3, atol=1e-6)


def test_relative_errors_are_sums_over_the_rows_asked_for() -> None:
    found = round_layers(weight_of(9, 64), original(inputs_of(64)), settings(), "layer")
    relative = found.relative_errors(slice(2, 7))
    assert list(relative) == list(WIDTHS)
    for row, width in enumerate(WIDTHS):
        expected = found.squared_errors[row, 2:7].sum() / found.squared_outputs[row, 2:7].sum()
        assert relative[width] == pytest.approx(expected.item(), rel=1e-6)
    assert all(relative[low] > relative[high] for low, high in pairwise(WIDTHS))


@every_rule
@pytest.mark.parametrize(("run", "block"), [(7, 21), (32, 32), (100, 100)])
def test_runs_and_blocks_of_columns_change_nothing(
    rule: SliceRule, run: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = weight_of(11, 100), original(inputs_of(100))
    expected = round_layers(weight, statistics, settings(rule, 64, sweeps=1), "layer")
    monkeypatch.setattr(rounding, "RUN_COLUMNS", run)
    monkeypatch.setattr(rounding, "BLOCK_COLUMNS", block)
    found = round_layers(weight, statistics, settings(rule, 64, sweeps=1), "layer")
    # Sums in another order move a few weights that lie on a threshold, and what follows them; a wrong range moves most.
    assert (found.codes == expected.codes).double().mean() > 0.9
    torch.testing.assert_close(found.squared_errors, expected.squared_errors, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("rows", [3, 16, 17])
def test_chunks_of_rows_get_what_the_whole_layer_gets(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = weight_of(17, 70), original(inputs_of(70))
    expected = round_layers(weight, statistics, settings("curved"), "layer")
    monkeypatch.setattr(rounding, "CHUNK_WEIGHTS", rows * 70 + 69)
    found = round_layers(weight, statistics, settings("curved"), "layer")
    assert torch.equal(found.scales, expected.scales)
    # Matrix products of another shape may sum in another order.
    assert (found.codes == expected.codes).double().mean() > 0.98
    torch.testing.assert_close(found.squared_errors, expected.squared_errors, rtol=0.05, atol=0.0)


def test_stacked_layers_get_the_codes_that_each_gets_alone() -> None:
    weight, statistics = weight_of(12, 70), original(inputs_of(70))
    together = round_layers(weight, statistics, settings("round"), "layer")
    parts = [round_layers(part, statistics, settings("round"), "layer") for part in weight.split([5, 7])]
    assert torch.equal(together.scales, torch.cat([part.scales for part in parts]))
    assert (together.codes == torch.cat([part.codes for part in parts])).double().mean() > 0.98


@every_rule
def test_the_same_input_gives_the_same_bits_and_is_not_written_to(rule: SliceRule) -> None:
    weight, statistics = weight_of(1, 40), original(inputs_of(40))
    kept = weight.clone()
    first, second = (round_layers(weight, statistics, settings(rule), "layer") for _ in range(2))
    for field in ("codes", "scales", "squared_errors", "squared_outputs"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_type_are_rounded_as_their_values_in_float32(dtype: torch.dtype) -> None:
    weight, statistics = weight_of(4, 40).to(dtype), original(inputs_of(40))
    found = round_layers(weight, statistics, settings(), "layer")
    assert torch.equal(found.codes, round_layers(weight.float(), statistics, settings(), "layer").codes)


@every_rule
def test_without_correlation_every_code_is_the_best_for_its_weight_alone(rule: SliceRule) -> None:
    weight = weight_of(6, 72)
    found = round_layers(weight, {None: InputStatistics(torch.eye(72), None, 1)}, settings(rule), "layer")
    scaled = weight / expand_scales(found.scales.float(), 72, 32)
    importance = torch.tensor(list(WEIGHTS.values()))[:, None].expand(5, weight.numel())
    expected = choose(scaled.flatten().expand(5, -1), importance, LevelTables.of(rule, weight.device)).view(6, 72)
    # The factor of a damped identity is exact to rounding only.
    assert (found.codes == expected).double().mean() > 0.99
    assert ((found.codes.int() - expected.int()).abs() <= (1 if rule != "round" else 4)).all()


def test_inputs_never_seen_are_rounded_to_nearest_and_disturb_nobody() -> None:
    weight, inputs, dead = weight_of(5, 64), inputs_of(64), [3, 40]
    inputs[:, dead] = 0
    found = round_layers(weight, original(inputs), settings(), "layer")
    nearest = nearest_codes(weight / expand_scales(found.scales.float(), 64, 32), "nested")
    assert torch.equal(found.codes[:, dead], nearest[:, dead])
    others = [column for column in range(64) if column not in dead]
    assert (found.codes[:, others] != nearest[:, others]).any()
    assert found.squared_errors.isfinite().all()


@every_rule
@pytest.mark.parametrize("group_size", [32, -1])
def test_weights_of_zero_stay_exactly_zero_at_every_width(rule: SliceRule, group_size: int) -> None:
    found = round_layers(torch.zeros(4, 40), original(inputs_of(40)), settings(rule, group_size), "layer")
    assert found.scales.eq(0).all()
    for width in WIDTHS:
        assert torch.equal(dequantize(found.codes, found.scales, width, rule, group_size), torch.zeros(4, 40))
    assert found.relative_errors(slice(None)) == dict.fromkeys(WIDTHS, 0.0)


@every_rule
def test_a_group_of_zeros_stays_zero_between_groups_that_are_not(rule: SliceRule) -> None:
    weight = weight_of(4, 100)
    weight[1, 32:64] = 0
    found = round_layers(weight, original(inputs_of(100)), settings(rule), "layer")
    for width in WIDTHS:
        values = dequantize(found.codes, found.scales, width, rule, 32)
        assert values[1, 32:64].eq(0).all()
        assert values.isfinite().all()
    assert found.squared_errors.isfinite().all()


def test_a_width_that_nobody_named_is_sensible_still() -> None:
    weight, inputs = weight_of(6, 70), inputs_of(70)
    found = round_layers(weight, original(inputs), settings(weights={3: 1.0}), "layer")
    relative = found.relative_errors(slice(None))
    nearest = round_to_nearest(weight, "nested", 32, torch.bfloat16)
    errors = [
        output_error(weight, dequantize(*parent, 3, "nested", 32), inputs) for parent in ((found.codes, found.scales), nearest)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert relative[8] < relative[3]


@pytest.fixture
def drifted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int | None, InputStatistics]]:
    """A weight, original inputs, inputs that drifted from them, and statistics with a stream of width 8 that sees those."""
    weight, inputs = weight_of(13, 96), inputs_of(96)
    generator = torch.Generator().manual_seed(9)
    moved = inputs @ (torch.eye(96) + 0.05 * torch.randn(96, 96, generator=generator))
    stream = InputStatistics(mean_product(moved, moved), mean_product(moved, inputs), len(inputs))
    return weight, inputs, moved, original(inputs) | {8: stream}


def test_asymmetry_moves_the_outputs_of_a_stream_towards_those_of_the_original(drifted) -> None:
    weight, inputs, moved, statistics = drifted
    errors = []
    for asymmetry in (0.0, 0.5, 1.0):
        found = round_layers(weight, statistics, settings(weights={8: 1.0}, asymmetry=asymmetry, damp=1e-4), "layer")
        values = dequantize(found.codes, found.scales, 8, "nested", 32)
        errors.append(float((inputs @ weight.t() - moved @ values.t()).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_without_asymmetry_the_original_inputs_do_not_matter(drifted) -> None:
    weight, _, _, statistics = drifted
    blind = statistics | {8: replace(statistics[8], cross=None)}
    found = [
        round_layers(weight, given, settings(asymmetry=asymmetry), "layer")
        for given, asymmetry in ((statistics, 0.0), (blind, 0.0), (blind, 0.7))
    ]
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].codes, found[2].codes)


def test_a_stream_is_for_its_own_width_alone(drifted) -> None:
    weight, _, _, statistics = drifted
    only_four = settings(weights={4: 1.0, 8: 1e-9})
    with_stream = round_layers(weight, statistics, only_four, "layer")
    without = round_layers(weight, {None: statistics[None]}, only_four, "layer")
    same = levels(with_stream.codes, 4, "nested") == levels(without.codes, 4, "nested")
    assert same.double().mean() > 0.99
    of_eight = settings(weights={8: 1.0})
    codes = [round_layers(weight, given, of_eight, "layer").codes for given in (statistics, {None: statistics[None]})]
    assert (codes[0] != codes[1]).double().mean() > 0.5


def test_a_hessian_that_cannot_be_factored_gives_rounding_to_nearest_and_a_warning_with_the_layers_name() -> None:
    weight = weight_of(4, 40)
    broken = {None: InputStatistics(torch.full((40, 40), torch.nan), None, 1)}
    with pytest.warns(UserWarning, match=r"^h\.2\.o_proj: "):
        found = round_layers(weight, broken, settings(), "h.2.o_proj")
    assert torch.equal(found.codes, nearest_codes(weight / expand_scales(found.scales.float(), 40, 32), "nested"))


@every_rule
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_nearest_rounding_is_within_half_a_step_everywhere(n: int, k: int, group_size: int, rule: SliceRule) -> None:
    weight = weight_of(n, k)
    weight[0] = 0
    codes, scales = round_to_nearest(weight, rule, group_size, torch.float32)
    assert (scales.shape, scales.dtype) == ((n, num_groups(k, group_size)), torch.float32)
    half_step = 0.5001 * (2.0 if rule == "curved" else 1.0) * expand_scales(scales, k, group_size)
    assert ((weight - dequantize(codes, scales, 8, rule, group_size)).abs() <= half_step).all()
