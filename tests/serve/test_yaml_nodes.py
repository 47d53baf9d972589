"""YAML nodes with their places: what is refused before anything is built."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.core.errors import FormatError
from serve import yaml_nodes
from serve.yaml_nodes import MAX_DEPTH, YamlSource, kind, line_of, shown

SOURCE = YamlSource("f.yaml")


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def loader(request, monkeypatch):
    """Both parsers of PyYAML, as far as it was built with them."""
    if hasattr(yaml, request.param):
        monkeypatch.setattr(yaml_nodes, "LOADER", getattr(yaml, request.param))
    else:
        assert yaml_nodes.LOADER is yaml.SafeLoader


def refused(text: str | bytes) -> str:
    with pytest.raises(FormatError) as caught:
        SOURCE.compose(text if isinstance(text, bytes) else text.encode())
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: &x 1\nb: *x", "1:4", "anchors (&name) and aliases (*name) are not allowed"),
        ("a: 1\nb: *x", "2:4", "anchors (&name) and aliases"),
        ("a:\n  - !!python/object/apply:os.system [ls]", "2:5", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: !!str 5", "1:4", "the tag 'tag:yaml.org,2002:str' is not allowed"),
        ("a: 1\n---\nb: 1", "2:1", "not YAML: but found another document"),
        ("a:\n\tb: 1", "2:1", "not YAML: found character"),
        ("a: b: c", "1:5", "not YAML: mapping values are not allowed"),
        ("é: b: c", "1:5", "not YAML: mapping values are not allowed"),
        ("a: 'open", "1:9", "not YAML: found unexpected end of stream"),
        (b"a: 1\nb\xc3\xa9: \xff", "2:5", "byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbfa\xff", "1:2", "byte 0xff is not UTF-8"),
        ("a: 1\nb: \x07", "2:4", "character '\\x07' is not allowed"),
        ("a: \ud800".encode("utf-8", "surrogatepass"), "1:4", "byte 0xed is not UTF-8"),
    ],
)
def test_what_is_not_plain_data_is_refused_where_it_stands(text, place, message):
    found = refused(text)
    assert found.startswith(f"f.yaml:{place}: {message}")


def test_a_text_that_would_grow_when_it_is_read_is_refused_at_once():
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert refused(laughs).startswith("f.yaml:1:5: anchors")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_depth_is_bounded_without_recursion(opening):
    # Some releases of the parser have a limit of their own, which comes first for some texts.
    said = refused(opening * 50_000)
    assert f"nested more than {MAX_DEPTH} deep" in said or "exceeded maximum nesting depth" in said
    assert SOURCE.compose(("[" * MAX_DEPTH + "]" * MAX_DEPTH).encode()) is not None


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff"])
def test_a_text_without_content_is_no_node_or_an_empty_one(text):
    node = SOURCE.compose(text.encode())
    assert node is None or kind(node) == "empty"


def test_entries_of_a_mapping_come_with_their_places():
    entries = SOURCE.mapping(SOURCE.compose(b"a: 1\nb:\n  - 2\n"), "it")
    assert list(entries) == ["a", "b"]
    assert [(line_of(key), line_of(value)) for key, value in entries.values()] == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "f.yaml:1:1: the file is a list; it must be a mapping, with `name: value` on each line"),
        ("secret", "f.yaml:1:1: the file is a text of length 6; it must be a mapping"),
        ("a: 1\nb: 2\n'a': 3", "f.yaml:3:1: 'a' is in the file twice, first on line 1; keep one"),
        ("? [a]\n: 1", "f.yaml:1:3: a name in the file is a list; it must be text"),
    ],
)
def test_what_is_no_mapping_of_different_names_is_refused(text, message):
    with pytest.raises(FormatError) as caught:
        SOURCE.mapping(SOURCE.compose(text.encode()), "the file")
    assert str(caught.value).startswith(message)


def test_a_value_in_a_message_is_short():
    assert shown("x" * 500) == "'" + "x" * 80 + "'..."
    assert [shown(SOURCE.compose(text)) for text in (b"abc", b"[a]", b"{a: 1}", b"''")] == [
        "'abc'",
        "a list",
        "a mapping",
        "empty",
    ]


@given(st.text(st.sampled_from("ab:-[]{},&*!|>'\"%@`#?\n \t0é"), max_size=60) | st.binary(max_size=40).map(str))
def test_any_text_is_a_node_or_an_error_with_a_place(text):
    for name in ("CSafeLoader", "SafeLoader"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(yaml_nodes, "LOADER", getattr(yaml, name, yaml.SafeLoader))
            try:
                node = SOURCE.compose(text.encode())
            except FormatError as error:
                name, line, column, _ = str(error).split(":", 3)
                assert (name, int(line) >= 1, int(column) >= 1) == ("f.yaml", True, True)
            else:
                assert node is None or isinstance(node, yaml.Node)
