"""Top-level spans of a JSON object agree with Python's own parser."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.json_object import JsonObject

keys = st.text(max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=10) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, max_size=5), st.booleans(), st.sampled_from([None, 0, 2]))
def test_members_are_those_of_the_document_in_order(document, ascii_only, indent):
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    parsed = JsonObject.parse(f" \r\n\t{text}\n ")
    assert [(member.key, member.value) for member in parsed.members] == list(document.items())
    assert json.loads(parsed.with_members({})) == document


@given(st.text(alphabet='{}[]":,\\ atrue0.e-\n', max_size=24))
def test_exactly_the_objects_that_json_accepts_are_accepted(text):
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        assert {member.key: member.value for member in JsonObject.parse(text).members} == expected
    else:
        with pytest.raises(ValueError):  # noqa: PT011  # the type is the contract
            JsonObject.parse(text)


def test_members_that_are_not_replaced_keep_their_spelling():
    text = '{ "a" : 1.50e0 , "p":1, "b": [ 1,2 ],"\\u0063":"\\u00e9\\ud800","a":NaN}'
    assert JsonObject.parse(text).with_members({"new": {"x": "é"}}, removed=("p",)) == (
        '{"new":{"x": "\\u00e9"},"a" : 1.50e0,"b": [ 1,2 ],"\\u0063":"\\u00e9\\ud800","a":NaN}'
    )


def test_keys_are_compared_after_unescaping():
    parsed = JsonObject.parse('{"precision":1,"precisi\\u006fn":2}')
    assert parsed.repeated(["precision", "model"]) == ["precision"]
    assert parsed.get("precision") == 2
    assert parsed.get("model") is None


def test_a_nested_object_is_found_with_its_duplicates():
    nested = JsonObject.parse('{"x":{"k":1,"k":2,"o":{"p":1,"p":1}},"y":[{}]}').nested("x")
    assert nested is not None
    assert nested.repeated(["k", "p"]) == ["k"]
    assert JsonObject.parse('{"y":[{}]}').nested("y") is None


@pytest.mark.parametrize("text", ["", "[]", "1", '"a"', "null", "{", '{"a"}', '{"a":1,}', '{"a":1}x', "{a:1}", '{"a":1 "b":2}'])
def test_what_is_not_an_object_is_refused_without_quoting_it(text):
    with pytest.raises(ValueError, match=r"expected|Expecting|Extra"):
        JsonObject.parse(text)


def test_nesting_beyond_the_stack_is_refused():
    with pytest.raises(ValueError, match="deeply"):
        JsonObject.parse('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
