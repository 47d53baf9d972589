from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.search.budget import BYTE_UNITS, TIME_UNITS, parse_bandwidth, parse_budget, parse_budgets, parse_size
from matgptq_vllm.core.errors import InputError


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("3.0", "bits", 3),
        (" 2.75 ", "bits", Fraction(11, 4)),
        (".5", "bits", Fraction(1, 2)),
        ("3bits", "bits", 3),
        ("500MiB", "bytes", 500 * 2**20),
        ("3.5 GB", "bytes", 3_500_000_000),
        ("12B", "bytes", 12),
        ("2.5ms", "time", 2_500_000_000),
        ("800us", "time", 800_000_000),
        ("800µs", "time", 800_000_000),
        ("1s", "time", 10**12),
    ],
)
def test_a_budget_is_read_exactly(text, kind, amount):
    budget = parse_budget(text)
    assert (budget.kind, budget.amount) == (kind, amount)


@pytest.mark.parametrize("text", ["", "three", "-3", "3.0.0", "1e3", "3 parsecs", "5 mb", "0", "0MiB", "nan", "inf"])
def test_nonsense_is_refused_with_its_text(text):
    with pytest.raises(InputError, match="budget"):
        parse_budget(text)


def test_several_budgets_keep_their_order_and_are_distinct():
    assert [budget.text for budget in parse_budgets("3.0, 2.5,500MiB")] == ["3.0", "2.5", "500MiB"]
    with pytest.raises(InputError, match=r"3\.0 is there twice"):
        parse_budgets("3.0,3.0")


@given(
    st.fractions(min_value=Fraction(1, 100), max_value=1000, max_denominator=10**6),
    st.sampled_from([("bits", ""), *(("bytes", unit) for unit in BYTE_UNITS), *(("time", unit) for unit in TIME_UNITS)]),
)
def test_an_amount_shown_upwards_is_a_budget_that_allows_it(number, kind_and_unit):
    kind, unit = kind_and_unit
    budget = parse_budget(f"1{unit}")
    amount = number * budget.amount
    shown = parse_budget(budget.shown(amount, upwards=True))
    assert shown.kind == kind
    assert amount <= shown.amount <= amount + budget.amount / 100


def test_bandwidth_and_size():
    assert parse_bandwidth("4.0TB/s") == 4 * 10**12
    assert parse_size("1.5GiB") == 3 * 2**29
    for text in ("4.0", "4TB", "4TB/ms", "0GB/s", "4ms/s"):
        with pytest.raises(InputError, match="bandwidth"):
            parse_bandwidth(text)
    with pytest.raises(InputError, match="needs a unit"):
        parse_size("12")
