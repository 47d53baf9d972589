"""calibrate.objective: the chosen code against all 256, by the definition and in float64."""

import pytest
import torch

from calibrate.objective import NARROW, WIDE, LevelTables, choose, codes_per_prefix
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, bits_read, levels, nearest_codes

every_rule = pytest.mark.parametrize("rule", SLICE_RULES)
ALL_CODES = torch.arange(256).to(torch.uint8)
CPU = torch.device("cpu")
SPREAD = torch.tensor([30.0, 15.0, 8.0, 1.0, 0.3])[:, None]
"""How far targets of each width lie from the weight once errors of other columns are made up for, in units of the scale."""


def scaled_weights() -> torch.Tensor:
    """Every edge of the straight rules, a hair to each side of it, the space between, and far outside the range. [n]."""
    edges = torch.arange(-290, 291) / 2
    random = torch.rand(3000, generator=torch.Generator().manual_seed(0)) * 300 - 150
    return torch.cat([edges, edges - 2**-12, edges + 2**-12, random])


def some_importance(n: int) -> torch.Tensor:
    """float32 [5, n], over several orders of magnitude."""
    return 10 ** (torch.rand(5, n, generator=torch.Generator().manual_seed(1)) * 4 - 2)


def direct_losses(targets: torch.Tensor, importance: torch.Tensor, rule: SliceRule) -> torch.Tensor:
    """The definition for all 256 codes: float64 [256, n]."""
    losses = torch.zeros(256, targets.shape[1], dtype=torch.float64)
    for row, width in enumerate(WIDTHS):
        error = targets[row].double() - levels(ALL_CODES, width, rule, torch.float64)[:, None]
        losses += importance[row].double() * error.square()
    return losses


def excess(targets: torch.Tensor, importance: torch.Tensor, rule: SliceRule) -> tuple[torch.Tensor, torch.Tensor]:
    """How much worse the chosen code is than the best of all, and the loss of the best: float64 [n] both."""
    losses = direct_losses(targets, importance, rule)
    chosen = choose(targets, importance, LevelTables.of(rule, CPU))
    best = losses.min(0).values
    return losses.gather(0, chosen.long()[None])[0] - best, best


def allowance(importance: torch.Tensor, rule: SliceRule) -> torch.Tensor:
    """Loss by which choosing the bin instead of the nearest level may miss the best under ``curved``, [n].

    Between two levels of step h the middle lies c = 1/256 (h/2)^2 beyond the edge, and taking the wrong one of them there
    costs twice their distance, at most 2 h, times c.
    """
    if rule != "curved":
        return torch.zeros(importance.shape[1])
    return sum(
        importance[WIDTHS.index(width)] * 2 * (2.0 * step) * (1 / 256 * (step / 2) ** 2) for width, step in ((6, 4.0), (8, 1.0))
    )


@every_rule
@pytest.mark.parametrize("named", [WIDTHS, (3, 4, 8), (8,), (2,), (6,)])
def test_with_one_target_for_all_widths_the_code_is_the_best_of_all_256(rule: SliceRule, named: tuple[int, ...]) -> None:
    scaled = scaled_weights()
    targets = scaled.expand(5, -1)
    importance = some_importance(scaled.shape[0]) * torch.tensor([float(width in named) for width in WIDTHS])[:, None]
    over, best = excess(targets, importance, rule)
    assert (over <= allowance(importance, rule) + 1e-5 * best + 1e-3 * importance.sum(0)).all()
    if rule == "nested" and named == WIDTHS:
        assert torch.equal(choose(targets, importance, LevelTables.of(rule, CPU))[-3000:], nearest_codes(scaled, rule)[-3000:])


@every_rule
def test_with_a_target_per_width_the_code_is_the_best_where_six_and_eight_bits_ask_for_neighbours(rule: SliceRule) -> None:
    scaled = scaled_weights()
    targets = scaled + torch.randn(5, scaled.shape[0], generator=torch.Generator().manual_seed(2)) * SPREAD
    # One bin of 6 bits apart at most: 4 units, narrower in the middle under ``curved``.
    targets[3] = targets[4] + (targets[3] - targets[4]).clamp(-2.5, 2.5)
    importance = some_importance(scaled.shape[0])
    over, best = excess(targets, importance, rule)
    assert (over <= allowance(importance, rule) + 1e-5 * best + 1e-3 * importance.sum(0)).all()


@every_rule
def test_wherever_the_targets_lie_no_code_nearest_to_that_of_eight_bits_within_a_prefix_is_better(rule: SliceRule) -> None:
    targets = torch.randn(5, 4000, generator=torch.Generator().manual_seed(3)) * 60
    importance = some_importance(4000)
    losses = direct_losses(targets, importance, rule)
    of_chosen = losses.gather(0, choose(targets, importance, LevelTables.of(rule, CPU)).long()[None])[0]
    span = codes_per_prefix(rule)
    for first in range(0, 256, span):
        nearest = nearest_codes(targets[4], rule).int().clamp(first, first + span - 1)
        assert (of_chosen <= losses.gather(0, nearest.long()[None])[0] * (1 + 1e-5)).all()


def test_what_is_missed_when_six_and_eight_bits_disagree_is_small() -> None:
    scaled = torch.rand(8000, generator=torch.Generator().manual_seed(4)) * 240 - 120
    targets = scaled + torch.randn(5, 8000, generator=torch.Generator().manual_seed(5)) * SPREAD * 2
    importance = torch.tensor([1.0, 2.2, 4.84, 23.4, 113.0])[:, None].expand(5, 8000)
    for rule in SLICE_RULES:
        over, best = excess(targets, importance, rule)
        assert over.sum() < 0.01 * best.sum()


@every_rule
def test_a_width_without_importance_has_no_say(rule: SliceRule) -> None:
    scaled = scaled_weights()
    targets = scaled + torch.randn(5, scaled.shape[0], generator=torch.Generator().manual_seed(6)) * SPREAD
    importance = some_importance(scaled.shape[0])
    for row in range(3):
        silenced, moved = importance.clone(), targets.clone()
        silenced[row] = 0
        moved[row] += 50.0
        tables = LevelTables.of(rule, CPU)
        assert torch.equal(choose(targets, silenced, tables), choose(moved, silenced, tables))


@every_rule
def test_of_equally_good_candidates_the_first_is_taken(rule: SliceRule) -> None:
    # Without any importance all are equal, and the first is that of prefix 0.
    chosen = choose(torch.full((5, 3), 100.0), torch.zeros(5, 3), LevelTables.of(rule, CPU))
    assert chosen.tolist() == [codes_per_prefix(rule) - 1] * 3
    # Between the two levels of 2 bits nearest to it, with nothing else to decide, the lower slice.
    only_two = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])[:, None]
    middle = (levels(ALL_CODES[64:65], 2, rule) + levels(ALL_CODES[128:129], 2, rule)) / 2
    tied = choose(middle.expand(5, 1), only_two, LevelTables.of(rule, CPU))
    assert levels(tied, 2, rule) == levels(ALL_CODES[64:65], 2, rule)


def test_under_round_the_narrow_widths_need_more_than_the_nearest_code() -> None:
    # 31.75 is nearest to level 32 at 8 bits, but only a code below 160 stays at level 0 of 2 bits.
    targets = torch.full((5, 1), 31.75)
    tables = LevelTables.of("round", CPU)
    assert choose(targets, torch.tensor([100.0, 0.0, 0.0, 0.0, 1.0])[:, None], tables).item() == 159
    assert choose(targets, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[:, None], tables).item() == 160


def test_under_round_a_target_is_not_rounded_twice_on_its_way_to_a_bin_of_six_bits() -> None:
    # 1.6 is nearest to level 0 of 6 bits, which codes up to 129 have; its nearest code at 8 bits, 130, has level 4.
    targets = torch.full((5, 1), 1.6)
    assert choose(targets, torch.tensor([0.0, 0.0, 0.0, 1.0, 0.01])[:, None], LevelTables.of("round", CPU)).item() == 129


@every_rule
def test_the_tables_hold_the_levels_and_the_codes_of_a_prefix_share_those_of_narrow_widths(rule: SliceRule) -> None:
    tables = LevelTables.of(rule, CPU)
    span = codes_per_prefix(rule)
    assert span == 1 << (8 - bits_read(4, rule))
    for row, width in enumerate(WIDTHS):
        assert torch.equal(tables.levels[row], levels(ALL_CODES, width, rule))
    for row, width in enumerate(NARROW):
        assert torch.equal(tables.narrow[row, :, 0].repeat_interleave(span), levels(ALL_CODES, width, rule))
    for row, width in enumerate(WIDE):
        by_prefix = levels(ALL_CODES, width, rule).view(-1, span)
        assert torch.equal(tables.lowest[row, :, 0], by_prefix.min(1).values)
        assert torch.equal(tables.highest[row, :, 0], by_prefix.max(1).values)
