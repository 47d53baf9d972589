import pytest
import torch

from calibrate.objective import JointObjective, bounds_of
from matgptq_vllm.core.slicing import levels

ALL_CODES = torch.arange(256).to(torch.uint8)
WEIGHTS = [
    {2: 1.0, 3: 1.0, 4: 1.0, 6: 1.0, 8: 1.0},
    {3: 1.0, 4: 1.0, 8: 1.0},
    {8: 1.0},
    {2: 1.0},
    {2: 0.01, 4: 3.0, 6: 0.5, 8: 100.0},
]


def scaled_weights() -> torch.Tensor:
    """Every threshold of both rules, a hair to each side of it, the space between, and far outside the range. float64."""
    thresholds = torch.arange(-290, 291, dtype=torch.float64) / 2
    random = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 300 - 150
    return torch.cat([thresholds, thresholds - 2**-12, thresholds + 2**-12, random])


def direct_losses(scaled: torch.Tensor, rule: str, weights: dict[int, float]) -> torch.Tensor:
    """The definition, for all 256 candidates: float64 [num weights, 256]."""
    total = sum(weights.values())
    return sum(
        weight / total * (scaled[:, None] - levels(ALL_CODES, width, rule, torch.float64)) ** 2
        for width, weight in weights.items()
    )


@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_chosen_code_is_as_good_as_the_best_of_all_256(rule, weights):
    scaled = scaled_weights()
    losses = direct_losses(scaled, rule, weights)
    chosen = JointObjective(rule, weights, {8: 1.0}).choose(scaled.float())
    of_chosen = losses.gather(1, chosen.long()[:, None])[:, 0]
    torch.testing.assert_close(of_chosen, losses.min(1).values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_is_the_weighted_sum_over_widths(rule, weights):
    scaled = scaled_weights()
    objective = JointObjective(rule, weights, {8: 1.0})
    losses = torch.stack([objective.loss(scaled.float(), code.expand(scaled.shape)) for code in ALL_CODES], dim=1)
    torch.testing.assert_close(losses.double(), direct_losses(scaled, rule, weights), rtol=1e-4, atol=1e-3)


def test_round_needs_more_than_the_nearest_code():
    # 31.75 is nearest to level 32 at 8 bits, but only a code below 160 stays at level 0 of 2 bits.
    narrow = JointObjective("round", {2: 100.0, 8: 1.0}, {8: 1.0})
    assert narrow.choose(torch.tensor([31.75])).item() == 159
    assert JointObjective("round", {8: 1.0}, {8: 1.0}).choose(torch.tensor([31.75])).item() == 160


@pytest.mark.parametrize("rule", ["nested", "round"])
def test_mean_levels_weigh_the_compensation_widths(rule):
    objective = JointObjective(rule, {8: 1.0}, {3: 1.0, 8: 3.0})
    expected = (levels(ALL_CODES, 3, rule) + 3 * levels(ALL_CODES, 8, rule)) / 4
    torch.testing.assert_close(objective.mean_levels(ALL_CODES), expected)


@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize("decided", [2, 3, 4, 6, 8])
def test_bounds_are_the_codes_that_no_decided_width_tells_apart(rule, decided):
    low, high = bounds_of(ALL_CODES, decided, rule)
    assert (low <= ALL_CODES).all()
    assert (high >= ALL_CODES).all()
    for width in [width for width in (2, 3, 4, 6, 8) if width <= decided]:
        assert torch.equal(levels(low, width, rule), levels(ALL_CODES, width, rule))
        assert torch.equal(levels(high, width, rule), levels(ALL_CODES, width, rule))


@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_within_bounds_the_chosen_code_is_as_good_as_the_best_allowed(rule, weights):
    scaled = scaled_weights()
    random = torch.randint(0, 256, scaled.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    low, high = bounds_of(random, 3, rule)
    allowed = (low[:, None] <= ALL_CODES) & (high[:, None] >= ALL_CODES)
    losses = direct_losses(scaled, rule, weights).masked_fill(~allowed, torch.inf)
    chosen = JointObjective(rule, weights, {8: 1.0}).choose(scaled.float(), (low, high))
    of_chosen = losses.gather(1, chosen.long()[:, None])[:, 0]
    torch.testing.assert_close(of_chosen, losses.min(1).values, rtol=1e-5, atol=1e-4)
