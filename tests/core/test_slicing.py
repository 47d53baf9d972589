"""core.slicing against the slice rules written out in exact arithmetic."""

import math
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import (
    SLICE_RULES,
    SliceRule,
    bend,
    bits_read,
    check_rule,
    dequantize,
    expand_scales,
    levels,
    nearest_codes,
    num_groups,
    slice_codes,
    unbend,
)

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"
ALL_CODES = torch.arange(256, dtype=torch.uint8)
HALF = Fraction(1, 2)

every_rule = pytest.mark.parametrize("rule", SLICE_RULES)
every_width = pytest.mark.parametrize("width", WIDTHS)
rules_of_bins = pytest.mark.parametrize("rule", ["nested", "curved"])
"""Rules under which a code owns the values between two edges, the same edges at every width that has them."""


def exact_slice(code: int, width: int, rule: str) -> int:
    scaled = Fraction(code, 2 ** (8 - width))
    return min(math.floor(scaled + HALF), 2**width - 1) if rule == "round" else math.floor(scaled)


def exact_bend(straight: Fraction) -> Fraction:
    return straight * (1 + abs(straight) / 256)


def exact_level(code: int, width: int, rule: str) -> Fraction:
    step = 2 ** (8 - width)
    straight = (exact_slice(code, width, rule) + (0 if rule == "round" else HALF)) * step - 128
    return exact_bend(straight) if rule == "curved" else straight


def thresholds(width: int, rule: str) -> set[Fraction]:
    """Weights, in units of the scale, at which ``nearest_codes`` goes from one level of ``width`` to the next."""
    if rule == "curved":
        return {exact_bend(edge) for edge in thresholds(width, "nested")}
    held = sorted({exact_level(code, width, rule) for code in range(256)})
    return {(low + high) / 2 for low, high in pairwise(held)}


@every_rule
@every_width
def test_slices_and_levels_of_all_codes_are_those_of_the_rule(rule: SliceRule, width: int) -> None:
    assert slice_codes(ALL_CODES, width, rule).tolist() == [exact_slice(code, width, rule) for code in range(256)]
    expected = [exact_level(code, width, rule) for code in range(256)]
    assert [Fraction(value) for value in levels(ALL_CODES, width, rule, torch.float64).tolist()] == expected


@every_rule
@every_width
def test_every_level_is_exact_in_float32(rule: SliceRule, width: int) -> None:
    found = levels(ALL_CODES, width, rule)
    assert found.dtype == torch.float32
    assert [Fraction(value) for value in found.tolist()] == [exact_level(code, width, rule) for code in range(256)]


@every_width
@pytest.mark.parametrize("rule", ["nested", "round"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_straight_levels_are_exact_in_half_precision(rule: SliceRule, width: int, dtype: torch.dtype) -> None:
    found = levels(ALL_CODES, width, rule, dtype)
    assert found.dtype == dtype
    assert [Fraction(value) for value in found.tolist()] == [exact_level(code, width, rule) for code in range(256)]


@every_width
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_curved_levels_in_half_precision_are_the_exact_ones_rounded_once(width: int, dtype: torch.dtype) -> None:
    exact = torch.tensor([float(exact_level(code, width, "curved")) for code in range(256)], dtype=torch.float64)
    assert torch.equal(levels(ALL_CODES, width, "curved", dtype), exact.to(dtype))


@every_rule
@every_width
def test_levels_ascend_with_the_slice(rule: SliceRule, width: int) -> None:
    value_of = {exact_slice(code, width, rule): levels(ALL_CODES, width, rule)[code].item() for code in range(256)}
    assert all(value_of[low] < value_of[low + 1] for low in range(2**width - 1))


@rules_of_bins
@every_width
def test_levels_are_the_same_on_both_sides_of_zero(rule: SliceRule, width: int) -> None:
    assert torch.equal(levels(255 - ALL_CODES, width, rule), -levels(ALL_CODES, width, rule))


def test_bending_keeps_zero_and_stretches_what_lies_further_out_more() -> None:
    assert bend(torch.tensor([-128.0, 0.0, 128.0])).tolist() == [-192.0, 0.0, 192.0]
    for width in WIDTHS:
        held = levels(ALL_CODES, width, "curved").unique()  # ascending
        gaps = held.diff()[2 ** (width - 1) - 1 :]  # from the gap around 0 outwards
        assert (gaps.diff() > 0).all()
        # From once the step near 0 to twice that at the ends.
        assert 2 ** (8 - width) <= gaps[0] <= gaps[-1] < 2 * 2 ** (8 - width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bending_and_unbending_undo_each_other(dtype: torch.dtype) -> None:
    straight = torch.arange(-1024, 1025, dtype=dtype) / 8
    torch.testing.assert_close(unbend(bend(straight)), straight, rtol=0.0, atol=256 * torch.finfo(dtype).eps)
    torch.testing.assert_close(bend(unbend(straight)), straight, rtol=0.0, atol=256 * torch.finfo(dtype).eps)
    assert [Fraction(value) for value in bend(straight.double()).tolist()] == [
        exact_bend(Fraction(value)) for value in straight.tolist()
    ]


@every_rule
@every_width
def test_a_width_has_two_to_its_power_levels_within_the_range(rule: SliceRule, width: int) -> None:
    found = {exact_level(code, width, rule) for code in range(256)}
    assert len(found) == 2**width
    most = 192 if rule == "curved" else 128
    assert min(found) >= -most
    assert max(found) < most


@every_rule
@every_width
def test_bits_that_are_not_read_never_matter(rule: SliceRule, width: int) -> None:
    read = bits_read(width, rule)
    masked = ALL_CODES & (0xFF << (8 - read) & 0xFF)
    assert torch.equal(slice_codes(masked, width, rule), slice_codes(ALL_CODES, width, rule))
    assert torch.equal(levels(masked, width, rule), levels(ALL_CODES, width, rule))


@every_rule
@every_width
def test_every_bit_that_is_read_matters(rule: SliceRule, width: int) -> None:
    lowest_read = 1 << (8 - bits_read(width, rule))
    assert not torch.equal(slice_codes(ALL_CODES ^ lowest_read, width, rule), slice_codes(ALL_CODES, width, rule))


def test_nested_and_curved_read_their_width_and_round_one_bit_more() -> None:
    assert [bits_read(width, "nested") for width in WIDTHS] == [2, 3, 4, 6, 8]
    assert [bits_read(width, "curved") for width in WIDTHS] == [2, 3, 4, 6, 8]
    assert [bits_read(width, "round") for width in WIDTHS] == [3, 4, 5, 7, 8]


@every_rule
@every_width
def test_slicing_leaves_its_input_alone(rule: SliceRule, width: int) -> None:
    codes = ALL_CODES.clone()
    slice_codes(codes, width, rule)
    levels(codes, width, rule)
    assert torch.equal(codes, ALL_CODES)


@rules_of_bins
def test_edges_of_bins_of_every_width_are_edges_at_eight_bits(rule: SliceRule) -> None:
    for width in WIDTHS:
        assert thresholds(width, rule) <= thresholds(8, rule)


@rules_of_bins
@every_width
def test_a_level_lies_within_its_bin(rule: SliceRule, width: int) -> None:
    end = exact_bend(Fraction(128)) if rule == "curved" else Fraction(128)
    edges = [-end, *sorted(thresholds(width, rule)), end]
    for code in range(256):
        part = exact_slice(code, width, rule)
        assert edges[part] < exact_level(code, width, rule) < edges[part + 1]


def test_round_thresholds_of_narrow_widths_are_not() -> None:
    for width in WIDTHS[:-1]:
        assert not thresholds(width, "round") & thresholds(8, "round")


def test_under_nested_the_nearest_code_is_best_at_every_width_at_once() -> None:
    weights = torch.arange(-140 * 16, 140 * 16 + 1, dtype=torch.float64) / 16  # [4481], thresholds included
    chosen = nearest_codes(weights, "nested")
    for width in WIDTHS:
        distances = (weights[:, None] - levels(ALL_CODES, width, "nested", torch.float64)).abs()  # [4481, 256]
        of_chosen = (weights - levels(chosen, width, "nested", torch.float64)).abs()
        assert torch.equal(of_chosen, distances.min(dim=1).values)


def test_under_curved_the_nearest_code_is_best_at_every_width_but_for_the_bend_of_one_bin() -> None:
    weights = torch.arange(-140 * 16, 140 * 16 + 1, dtype=torch.float64) / 16  # [4481]
    chosen = nearest_codes(weights, "curved")
    for width in WIDTHS:
        distances = (weights[:, None] - levels(ALL_CODES, width, "curved", torch.float64)).abs()  # [4481, 256]
        of_chosen = (weights - levels(chosen, width, "curved", torch.float64)).abs()
        # Between two levels of step h the middle lies 1 / 256 * (h / 2)^2 beyond the edge of their bins.
        bend_of_bin = 1 / 256 * (2 ** (8 - width) / 2) ** 2
        assert (of_chosen - distances.min(dim=1).values).max() <= 2 * bend_of_bin + 1e-9


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_code_changes_exactly_at_the_thresholds(rule: SliceRule, dtype: torch.dtype) -> None:
    for code, threshold in enumerate(sorted(thresholds(8, rule))):
        around = torch.tensor([float(threshold) + delta for delta in (-(2.0**-14), 0.0, 2.0**-14)], dtype=dtype)
        below, at, above = nearest_codes(around, rule).tolist()
        assert (below, above) == (code, code + 1)
        assert at in (code, code + 1)


@every_rule
def test_the_level_of_a_code_has_that_code_as_its_nearest(rule: SliceRule) -> None:
    assert torch.equal(nearest_codes(levels(ALL_CODES, 8, rule), rule), ALL_CODES)


@every_rule
def test_weights_beyond_the_range_get_the_outermost_codes(rule: SliceRule) -> None:
    end = 192.0 if rule == "curved" else 128.0
    weights = torch.tensor([-math.inf, -1e30, -end - 1, -end, end - 0.5, end, 1e30, math.inf])
    assert nearest_codes(weights, rule).tolist() == [0, 0, 0, 0, 255, 255, 255, 255]


@given(st.floats(-225, 225, width=32))
@settings(deadline=None)
def test_under_curved_the_bin_of_the_chosen_code_holds_the_weight(weight: float) -> None:
    chosen = int(nearest_codes(torch.tensor(weight, dtype=torch.float64), "curved"))
    slack = Fraction(1, 2**44)
    assert chosen == 0 or exact_bend(Fraction(chosen - 128)) - slack <= Fraction(weight)
    assert chosen == 255 or Fraction(weight) < exact_bend(Fraction(chosen - 127)) + slack


@given(st.floats(-150, 150, width=32), st.sampled_from(["nested", "round"]))
@settings(deadline=None)
def test_no_code_is_nearer_than_the_nearest(weight: float, rule: SliceRule) -> None:
    chosen = int(nearest_codes(torch.tensor(weight, dtype=torch.float64), rule))
    best = min(abs(Fraction(weight) - exact_level(code, 8, rule)) for code in range(256))
    # Adding 128 rounds to float64's 2^-45 there.
    assert abs(Fraction(weight) - exact_level(chosen, 8, rule)) <= best + Fraction(1, 2**44)


@pytest.mark.parametrize("rule", ["floor", "Nested", "bent", "", None, 4])
def test_an_unknown_rule_is_refused(rule: str) -> None:
    with pytest.raises(InputError, match="nested, curved, round"):
        check_rule(rule)


@pytest.mark.parametrize("width", [0, 1, 5, 7, 9, -2])
def test_a_width_that_cannot_be_read_is_refused_everywhere(width: int) -> None:
    with pytest.raises(InputError, match=f"width {width} "):
        bits_read(width, "nested")
    for function_of_codes in (slice_codes, levels):
        with pytest.raises(InputError, match=f"width {width} "):
            function_of_codes(ALL_CODES, width, "nested")


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 127, 128, 129, 130, 896])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_scales_spread_over_ragged_groups(k: int, group_size: int) -> None:
    groups = num_groups(k, group_size)
    assert groups == (1 if group_size == -1 else math.ceil(Fraction(k, group_size)))
    scales = torch.arange(3 * groups, dtype=torch.float32).view(3, groups)
    spread = expand_scales(scales, k, group_size).expand(3, k)
    for column in range(k):
        assert torch.equal(spread[:, column], scales[:, 0 if group_size == -1 else column // group_size])


@every_rule
@every_width
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 1, 32), (3, 33, 32), (7, 130, 128), (2, 129, 64), (5, 31, -1)])
def test_dequantized_weights_are_scale_times_level(rule: SliceRule, width: int, n: int, k: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand((n, num_groups(k, group_size)), generator=generator).to(torch.bfloat16)
    weights = dequantize(codes, scales, width, rule, group_size, torch.float64)
    assert weights.shape == (n, k)
    for row in range(n):
        for column in range(k):
            scale = Fraction(scales[row, 0 if group_size == -1 else column // group_size].item())
            assert Fraction(weights[row, column].item()) == scale * exact_level(int(codes[row, column]), width, rule)


def test_the_worked_examples_of_the_format_page_are_true() -> None:
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    table = re.search(r"^\| code, width \|(.*)\|\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert table is not None
    assert re.findall(r"`(\w+)`", table[1]) == list(SLICE_RULES)
    rows = table[2].splitlines()
    assert len(rows) >= 3
    for row in rows:
        code, width, *stated = re.findall(r"-?\d+(?:\.\d+)?", row)
        assert len(stated) == 2 * len(SLICE_RULES)
        for rule, part, level in zip(SLICE_RULES, stated[::2], stated[1::2], strict=True):
            codes = torch.tensor([int(code)], dtype=torch.uint8)
            assert slice_codes(codes, int(width), rule).item() == int(part)
            assert levels(codes, int(width), rule).item() == float(level)
