"""core.precision: widths, profile names and the catalogue of one replica."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import (
    ALIAS_SEPARATOR,
    AUTO,
    PARENT_WIDTH,
    PROFILE_NAME,
    WIDTHS,
    Catalogue,
    alias,
    check_profile_name,
    check_width,
    precision_of_salt,
    salt_of_precision,
    uniform_name,
    uniform_width,
)

NAME_CHARACTERS = string.ascii_letters + string.digits + "._-"
CATALOGUE = Catalogue(("2", "3", "4", "mix-3.0"), default="4")


@pytest.mark.parametrize("width", range(-1, 300))
def test_exactly_the_listed_widths_are_accepted(width: int) -> None:
    if width in (2, 3, 4, 6, 8):
        assert check_width(width) == width
    else:
        with pytest.raises(InputError, match=rf"{width} .*2, 3, 4, 6, 8"):
            check_width(width)


@pytest.mark.parametrize("width", [None, True, False, 4.0, "4", b"4", [4], {}, float("nan")])
def test_what_is_not_an_integer_is_no_width(width: object) -> None:
    with pytest.raises(InputError, match="2, 3, 4, 6, 8"):
        check_width(width)


def test_widths_ascend_to_the_parent_width() -> None:
    assert list(WIDTHS) == sorted(set(WIDTHS))
    assert WIDTHS[-1] == PARENT_WIDTH


def test_uniform_names_and_widths_are_inverse() -> None:
    assert [uniform_width(uniform_name(width)) for width in WIDTHS] == list(WIDTHS)


@pytest.mark.parametrize("name", ["5", "04", "4.0", " 4", "4 ", "", "auto", "mix-4", "٤", "16"])
def test_other_names_are_not_uniform(name: str) -> None:
    assert uniform_width(name) is None


@given(st.text(NAME_CHARACTERS, min_size=1, max_size=64).filter(lambda name: name[0] not in "._-"))
@settings(deadline=None)
def test_well_formed_names_are_kept(name: str) -> None:
    assert check_profile_name(name) == name


@given(st.text(max_size=70))
@settings(deadline=None)
def test_a_name_is_accepted_exactly_if_it_is_well_formed(name: str) -> None:
    well_formed = 1 <= len(name) <= 64 and set(name) <= set(NAME_CHARACTERS) and name[0] not in "._-"
    if well_formed:
        assert check_profile_name(name) == name
    else:
        with pytest.raises(InputError, match="is not a precision"):
            check_profile_name(name)


@pytest.mark.parametrize("character", [chr(code) for code in range(256)])
def test_each_character_is_allowed_exactly_if_it_is_listed(character: str) -> None:
    assert bool(PROFILE_NAME.fullmatch(f"a{character}")) == (character in NAME_CHARACTERS)


def test_an_integer_stands_for_the_uniform_name() -> None:
    assert check_profile_name(4) == "4"


@pytest.mark.parametrize("name", [None, True, 4.0, b"4", ["4"], "", "-4", ".4", "4\n", "a b", "é", "x" * 65, -4])
def test_malformed_names_are_refused(name: object) -> None:
    with pytest.raises(InputError, match="is not a precision"):
        check_profile_name(name)


def test_a_huge_name_is_cut_in_the_message() -> None:
    with pytest.raises(InputError) as caught:
        check_profile_name("x" * 100_000)
    assert len(str(caught.value)) < 300


def test_the_alias_separator_cannot_occur_in_a_profile_name() -> None:
    assert alias("org/model", "mix-3.0") == "org/model@mix-3.0"
    assert not PROFILE_NAME.fullmatch(f"a{ALIAS_SEPARATOR}4")


@pytest.mark.parametrize(
    ("asked", "name"), [(None, "4"), (AUTO, "4"), ("2", "2"), (3, "3"), ("4", "4"), ("mix-3.0", "mix-3.0")]
)
def test_resolve_names_the_profile_and_index_its_position(asked: object, name: str) -> None:
    assert CATALOGUE.resolve(asked) == name
    assert CATALOGUE.profiles[CATALOGUE.index(asked)] == name


@pytest.mark.parametrize("asked", ["8", 8, "mix-3.1", "MIX-3.0", "Auto", "4 ", "", "4,3", True, 4.0, [], {"a": 1}, "x" * 99])
def test_resolve_refuses_anything_else_and_lists_what_can_be_asked(asked: object) -> None:
    for method in (CATALOGUE.resolve, CATALOGUE.index):
        with pytest.raises(InputError, match=r"2, 3, 4, mix-3\.0, auto"):
            method(asked)


def test_a_catalogue_refuses_a_default_that_it_does_not_hold() -> None:
    with pytest.raises(InputError, match=r"'8' .*2, 4"):
        Catalogue(("2", "4"), default="8")


@given(st.from_regex(PROFILE_NAME, fullmatch=True), st.none() | st.text(min_size=1))
def test_a_salt_names_its_precision_whatever_the_client_adds(name: str, salt: str | None) -> None:
    named = salt_of_precision(name, salt)
    assert precision_of_salt(named) == name
    assert named != salt_of_precision(name, "x" + (salt or ""))


@pytest.mark.parametrize("salt", [None, "", "mine", "|precision=4", "Precision=4"])
def test_other_salts_name_no_precision(salt: str | None) -> None:
    assert precision_of_salt(salt) is None
