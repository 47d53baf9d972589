"""core.profile: assignments of widths to layers, and the table of them."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.profile import (
    FUSED_LAYERS,
    PROFILES_VERSION,
    Profile,
    all_profiles,
    profiles_from_json,
    profiles_to_json,
    uniform_profile,
)

ATTENTION = tuple(f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj"))
MLP = tuple(f"model.layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj"))
LAYERS = (*ATTENTION, "model.layers.0.self_attn.o_proj", *MLP, "model.layers.0.mlp.down_proj")


def mixed(name: str = "mix-3.0", attention: int = 2, mlp: int = 3, other: int = 6) -> Profile:
    widths = dict.fromkeys(LAYERS, other) | dict.fromkeys(ATTENTION, attention) | dict.fromkeys(MLP, mlp)
    return Profile(name, widths)


def table(**profiles: Any) -> str:
    return json.dumps({"version": PROFILES_VERSION, "profiles": profiles})


@pytest.mark.parametrize("width", WIDTHS)
def test_a_uniform_profile_reads_every_layer_at_its_width(width: int) -> None:
    profile = uniform_profile(width, LAYERS)
    assert profile.name == str(width)
    assert dict(profile.widths) == dict.fromkeys(LAYERS, width)
    assert profile.max_width == width


def test_max_width_is_that_of_the_widest_layer() -> None:
    assert mixed().max_width == 6


def test_average_bits_weighs_layers_by_their_size() -> None:
    profile = Profile("mix", {"a": 2, "b": 8, "c": 3})
    assert profile.average_bits({"a": 100, "b": 100, "c": 200}) == 4.0
    assert profile.average_bits({"a": 7}) == 2.0
    assert uniform_profile(4, LAYERS).average_bits({layer: 3 + i for i, layer in enumerate(LAYERS)}) == 4.0


@pytest.mark.parametrize("group", FUSED_LAYERS)
@pytest.mark.parametrize("prefix", ["", "h.0.", "model.layers.11.self_attn."])
def test_layers_that_engines_fuse_must_agree_whichever_differs(group: tuple[str, ...], prefix: str) -> None:
    names = [prefix + leaf for leaf in group]
    assert Profile("mix", dict.fromkeys(names, 3)).width_of(names) == 3
    for odd in names:
        with pytest.raises(InputError, match=r"'mix' has no common width for the fused layers"):
            Profile("mix", dict.fromkeys(names, 3) | {odd: 4})


def test_layers_of_different_blocks_need_not_agree() -> None:
    profile = Profile("mix", {"0.q_proj": 2, "0.k_proj": 2, "1.q_proj": 4, "1.k_proj": 4, "1.my_q_proj": 8})
    assert profile.width_of(["0.q_proj", "0.k_proj"]) == 2
    with pytest.raises(InputError, match="no common width"):
        profile.width_of(["0.q_proj", "1.q_proj"])


@pytest.mark.parametrize("layers", [[], ["unknown"], ["0.o_proj", "unknown"]])
def test_the_width_of_layers_it_does_not_have_is_refused(layers: list[str]) -> None:
    with pytest.raises(InputError, match="no common width"):
        Profile("mix", {"0.o_proj": 2}).width_of(layers)


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a@b", "é"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a precision"):
        Profile(name, {"a": 4})


def test_the_name_that_leaves_the_choice_to_the_replica_is_refused() -> None:
    with pytest.raises(InputError, match="'auto'"):
        Profile("auto", {"a": 4})


@pytest.mark.parametrize("width", WIDTHS)
def test_the_name_of_a_uniform_profile_is_refused_for_a_mixed_one(width: int) -> None:
    with pytest.raises(InputError, match=f"'{width}' means width {width} everywhere"):
        Profile(str(width), {"a": width, "b": 2 if width != 2 else 3})


@pytest.mark.parametrize("width", [0, 1, 5, 7, 16, True, 4.0, "4", None])
def test_a_width_that_cannot_be_read_is_refused(width: Any) -> None:
    with pytest.raises(InputError, match="2, 3, 4, 6, 8"):
        Profile("mix", {"a": width})


@pytest.mark.parametrize("max_width", WIDTHS)
def test_a_replica_gets_the_uniform_profiles_then_the_stored_ones_it_can_read(max_width: int) -> None:
    stored = [mixed("wide", 8, 8, 2), mixed("middle", 2, 4, 2), mixed("narrow", 2, 3, 2)]
    names = [profile.name for profile in all_profiles(LAYERS, stored, max_width)]
    needed = {"wide": 8, "middle": 4, "narrow": 3}
    expected = [str(width) for width in (2, 3, 4, 6, 8) if width <= max_width]
    assert names == expected + [name for name, width in needed.items() if width <= max_width]


widths_of_groups = st.tuples(*[st.sampled_from(WIDTHS)] * 3)


@given(st.dictionaries(st.from_regex(r"[a-z][A-Za-z0-9._-]{1,20}", fullmatch=True), widths_of_groups, max_size=4))
@settings(deadline=None)
def test_any_table_survives_json(drawn: dict[str, tuple[int, int, int]]) -> None:
    profiles = [mixed(name, *widths) for name, widths in drawn.items() if name != "auto"]
    assert profiles_from_json(profiles_to_json(profiles), LAYERS) == profiles


def test_two_profiles_of_one_name_are_not_written() -> None:
    with pytest.raises(InputError, match=r"'mix-3\.0' is there twice"):
        profiles_to_json([mixed(), mixed("other"), mixed(attention=4)])


def test_a_uniform_profile_is_not_written() -> None:
    with pytest.raises(InputError, match="'4' is uniform"):
        profiles_to_json([uniform_profile(4, LAYERS)])


def test_a_name_that_is_twice_in_the_text_is_refused() -> None:
    entry = json.dumps({"widths": dict(mixed().widths)})
    text = f'{{"version": 1, "profiles": {{"mix": {entry}, "mix": {entry}}}}}'
    with pytest.raises(FormatError, match=r"matgptq_profiles\.json: .*twice"):
        profiles_from_json(text, LAYERS)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{}", '{"version": 1}', '{"profiles": {}}', '{"version": 1, "profiles": [1]}',
     '{"version": 1, "profiles": null}', '{"version": 1, "profiles": "x"}'],
)  # fmt: skip
def test_text_that_is_no_table_is_refused_naming_its_source(text: str) -> None:
    with pytest.raises(FormatError, match="some/table: not a profile table"):
        profiles_from_json(text, LAYERS, "some/table")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(FormatError, match=f"version is {version!r}, this release reads 1"):
        profiles_from_json(json.dumps({"version": version, "profiles": {}}), LAYERS)


GOOD = dict.fromkeys(LAYERS, 4)


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        ("mix", {"widths": GOOD | {"unknown": 4}}, "unknown"),
        ("mix", {"widths": {name: 4 for name in LAYERS if name != LAYERS[3]}}, "o_proj"),
        ("mix", {"widths": {}}, "does not cover"),
        ("mix", {"widths": GOOD | {LAYERS[3]: 5}}, "width 5"),
        ("mix", {"widths": GOOD | {LAYERS[3]: "4"}}, "width '4'"),
        ("mix", {"widths": GOOD | {ATTENTION[1]: 3}}, "common width"),
        ("mix", {"widths": None}, "mix"),
        ("mix", {"widths": 3}, "mix"),
        ("mix", {}, "widths"),
        ("mix", [], "mix"),
        ("mix", None, "mix"),
        ("4", {"widths": GOOD}, "uniform"),
        ("4", {"widths": GOOD | {LAYERS[3]: 3}}, "everywhere"),
        ("auto", {"widths": GOOD}, "auto"),
        ("a b", {"widths": GOOD}, "not a precision"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_by_name(name: str, entry: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        profiles_from_json(table(**{name: entry}), LAYERS)
    assert f"profile {name!r}" in str(caught.value)
