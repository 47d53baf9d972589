"""Precedence and validity of precision selectors."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.core.precision import Catalogue
from serve.errors import RequestError
from serve.selection import REASONS, Selection, Selectors, base_models, precision_header, select, split_alias

CATALOGUE = Catalogue(("2", "3", "4", "6", "mix-3.0"), "6")
MODELS = ("base", "we@rd")

HEADERS = (None, "2", "auto")
BODIES = (None, 3, "3", "auto")
XARGS = (None, "3", 3, "auto")
ALIASES = (None, "base", "base@4", "base@auto", "unknown@4", "we@rd", "we@rd@4")


@pytest.mark.parametrize(("header", "body", "xargs", "model"), list(itertools.product(HEADERS, BODIES, XARGS, ALIASES)))
def test_the_first_selector_present_decides(header, body, xargs, model):
    selectors = Selectors(header, body, xargs, model)
    if body is not None and xargs is not None and str(body) != str(xargs):
        with pytest.raises(RequestError, match="send one of them"):
            select(selectors, CATALOGUE, MODELS)
        return
    is_alias = model in ("base@4", "base@auto", "we@rd@4")
    by_kind = {
        "header": header,
        "body": body if body is not None else xargs,
        "model": model.rpartition("@")[2] if is_alias else None,
    }
    reason, asked = next(((kind, str(value)) for kind, value in by_kind.items() if value is not None), ("default", "6"))
    expected = ("6", "auto") if asked == "auto" else (asked, reason)
    assert select(selectors, CATALOGUE, MODELS) == Selection(*expected, model.rpartition("@")[0] if is_alias else None)
    assert expected[1] in REASONS


@pytest.mark.parametrize("precision", ["8", 8, "mix-9", "Auto", "44"])
@pytest.mark.parametrize("field", ["header", "body", "xargs"])
def test_a_precision_that_is_not_held_is_refused_with_the_list(field, precision):
    with pytest.raises(RequestError, match=r"2, 3, 4, 6, mix-3\.0, auto") as caught:
        select(Selectors(**{field: str(precision) if field == "header" else precision}), CATALOGUE, MODELS)
    assert (caught.value.status, caught.value.rejection) == (400, "precision")


@pytest.mark.parametrize(
    "precision", [True, False, 4.0, [], {}, ["4"], {"a": 1}, "", " ", "4 ", "a b", "4,8", "é", "x" * 65, "4\n"]
)
@pytest.mark.parametrize("field", ["body", "xargs"])
def test_nonsense_in_the_body_is_refused_with_the_list(field, precision):
    with pytest.raises(RequestError, match=r"2, 3, 4, 6, mix-3\.0, auto") as caught:
        select(Selectors(**{field: precision}), CATALOGUE, MODELS)
    assert caught.value.status == 400


@pytest.mark.parametrize("other", [{"body": {}}, {"xargs": True}])
def test_a_selector_that_does_not_decide_must_still_be_well_formed(other):
    with pytest.raises(RequestError):
        select(Selectors(header="4", **other), CATALOGUE, MODELS)


def test_a_selector_that_does_not_decide_may_name_a_profile_that_is_not_held():
    assert select(Selectors(header="4", body="8", model="base@8"), CATALOGUE, MODELS) == Selection("4", "header", "base")


@pytest.mark.parametrize("precision", ["8", "5", "", "x y", "z" * 500])
def test_an_alias_of_a_served_model_at_no_held_profile_is_not_found_and_lists_the_aliases(precision):
    with pytest.raises(RequestError, match=r"base@2, base@3, base@4, base@6, base@mix-3\.0") as caught:
        select(Selectors(model=f"base@{precision}"), CATALOGUE, MODELS)
    assert (caught.value.status, caught.value.param) == (404, "model")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("model", [None, 3, ["base@4"], "base", "other", "other@4", "@4", "we@rd", ""])
def test_a_model_that_is_no_alias_is_left_to_vllm(model):
    assert split_alias(model, MODELS) == (None, None)


def test_base_models_leave_out_aliases_and_keep_names_that_only_look_like_one():
    served = ["base", "we@rd", "base@4", "base@8", "we@rd@2", "other@4"]
    assert base_models(served, CATALOGUE) == ("base", "we@rd", "base@8", "other@4")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-precision", b"4"), (b"x-precision", b"8")],
        [(b"x-precision", b"4"), (b"X-Precision", b"4")],
        [(b"x-precision", b"\xff")],
        [(b"x-precision", b"\xc3")],
    ],
)
def test_a_repeated_or_undecodable_header_is_refused(headers):
    with pytest.raises(RequestError) as caught:
        precision_header(headers, CATALOGUE)
    assert (caught.value.status, caught.value.rejection) == (400, "header")
    assert all(name in str(caught.value) for name in CATALOGUE.profiles)
    with pytest.raises(RequestError):
        precision_header(headers, None)


def test_header_names_are_compared_without_case_and_values_without_surrounding_space():
    assert precision_header([(b"accept", b"*/*"), (b"X-PRECISION", b" \tmix-3.0 ")], CATALOGUE) == "mix-3.0"
    assert precision_header([(b"x-precisions", b"4")], CATALOGUE) is None


def outcome_of(make_selectors):
    try:
        return select(make_selectors(), CATALOGUE, MODELS)
    except RequestError as error:
        return error


@given(st.binary(max_size=80))
def test_any_header_value_gives_a_held_profile_or_a_refusal(value):
    outcome = outcome_of(lambda: Selectors(precision_header([(b"x-precision", value)], CATALOGUE)))
    if isinstance(outcome, RequestError):
        assert outcome.status == 400
        assert outcome.rejection in ("header", "precision")
    else:
        assert outcome.profile in CATALOGUE.profiles
        assert value.strip(b" \t").decode() in (*CATALOGUE.profiles, "auto")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.none() | st.text(max_size=20), json_values, json_values, json_values)
def test_any_selectors_give_a_held_profile_or_a_refusal(header, body, xargs, model):
    outcome = outcome_of(lambda: Selectors(header, body, xargs, model))
    if isinstance(outcome, RequestError):
        assert outcome.status in (400, 404)
    else:
        assert outcome.profile in CATALOGUE.profiles
        assert outcome.reason in REASONS
