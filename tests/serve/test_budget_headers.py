"""serve.budget_headers: what a client may write, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.budget import Budget
from serve.budget_headers import LATENCY_HEADER, POLICY_HEADER, TTFT_HEADER, BudgetRequest, budget_request
from serve.errors import RequestError


def ask(**values: str) -> BudgetRequest:
    names = {"tpot": LATENCY_HEADER, "ttft": TTFT_HEADER, "policy": POLICY_HEADER}
    return budget_request([(names[key].lower().encode(), value.encode()) for key, value in values.items()])


def test_without_headers_there_is_no_budget():
    assert ask() == BudgetRequest(None, strict=False)


def test_either_budget_may_be_given_and_a_policy():
    assert ask(tpot="30") == BudgetRequest(Budget(30.0, None))
    assert ask(ttft="12.5", policy="best-effort") == BudgetRequest(Budget(None, 12.5))
    assert ask(tpot=" 30\t", ttft="0500", policy="strict") == BudgetRequest(Budget(30.0, 500.0), strict=True)


@pytest.mark.parametrize(
    "value", ["", "0", "-1", "0.0", "1e3", "nan", "inf", "30ms", "3,5", ".5", "+3", "٣", "1" * 13, "10000001"]
)
@pytest.mark.parametrize("name", ["tpot", "ttft"])
def test_what_is_no_time_is_refused(name: str, value: str):
    with pytest.raises(RequestError, match="milliseconds above 0") as caught:
        ask(**{name: value})
    assert (caught.value.status, caught.value.rejection) == (400, "budget")


def test_a_policy_must_be_known():
    with pytest.raises(RequestError, match="'hard'; send strict or best-effort"):
        ask(policy="hard")


@pytest.mark.parametrize("name", [LATENCY_HEADER, TTFT_HEADER, POLICY_HEADER])
def test_a_header_may_not_occur_twice(name: str):
    with pytest.raises(RequestError, match=f"{name} occurs 2 times"):
        budget_request([(name.encode(), b"30"), (name.upper().encode(), b"30")])


@given(st.lists(st.tuples(st.sampled_from([LATENCY_HEADER, TTFT_HEADER, POLICY_HEADER]), st.binary(max_size=20)), max_size=4))
def test_any_bytes_give_a_budget_or_a_refusal(headers: list[tuple[str, bytes]]):
    try:
        asked = budget_request([(name.encode(), value) for name, value in headers])
    except RequestError as error:
        refusal = error
    else:
        assert asked.budget is None or asked.budget.bounds_anything
        return
    assert refusal.status == 400
    assert len(str(refusal)) < 300
