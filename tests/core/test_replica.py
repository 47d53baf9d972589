"""core.replica: options of one replica and their way through vLLM's additional_config."""

import json
from typing import Any

import pytest

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.profile import Profile, all_profiles
from matgptq_vllm.core.replica import ADDITIONAL_CONFIG_KEY, ReplicaOptions, parse_bytes

LAYERS = ("a.o_proj", "a.down_proj")
STORED = [Profile("mix-3.0", {"a.o_proj": 4, "a.down_proj": 2})]


@pytest.mark.parametrize("max_width", WIDTHS)
@pytest.mark.parametrize("default", [None, "2", "mix-3.0"])
def test_options_survive_the_way_through_json(max_width: int, default: str | None) -> None:
    options = ReplicaOptions(max_width, default)
    text = json.dumps(options.to_additional_config())
    assert ReplicaOptions.from_additional_config(json.loads(text)) == options


def test_widths_with_graphs_survive_json_and_must_be_held() -> None:
    options = ReplicaOptions(6, graph_widths=(2, 6))
    assert ReplicaOptions.from_additional_config(json.loads(json.dumps(options.to_additional_config()))) == options
    none = ReplicaOptions(graph_widths=())
    assert (
        ReplicaOptions.from_additional_config(json.loads(json.dumps(none.to_additional_config()))) == none != ReplicaOptions()
    )
    with pytest.raises(InputError, match="leave the others out"):
        ReplicaOptions(4, graph_widths=(2, 6))
    with pytest.raises(InputError, match="use one of 2, 3, 4, 6, 8"):
        ReplicaOptions(graph_widths=(5,))


@pytest.mark.parametrize(("max_width", "draft_width"), [(4, 4), (4, 8), (2, 2), (8, 5)])
def test_only_a_narrower_slice_can_draft(max_width: int, draft_width: int) -> None:
    assert ReplicaOptions(8, draft_width=3).draft_width == 3
    with pytest.raises(InputError, match=f"{draft_width}"):
        ReplicaOptions(max_width, draft_width=draft_width)


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, object(), {ADDITIONAL_CONFIG_KEY: {}}])
def test_without_options_the_defaults_hold(config: object) -> None:
    assert ReplicaOptions.from_additional_config(config) == ReplicaOptions(8, None)


def test_other_keys_of_additional_config_are_left_to_others() -> None:
    config = {"x": {"y": 1}, ADDITIONAL_CONFIG_KEY: {"max_width": 3}}
    assert ReplicaOptions.from_additional_config(config).max_width == 3


@pytest.mark.parametrize("options", [{"width": 4}, {"max_width": 4, "x": 1}, [4], "4", 4, None])
def test_unknown_options_are_refused_and_the_known_ones_listed(options: Any) -> None:
    with pytest.raises(InputError, match="max_width, default_precision"):
        ReplicaOptions.from_additional_config({ADDITIONAL_CONFIG_KEY: options})


@pytest.mark.parametrize("max_width", [0, 1, 5, 7, 9, "4", None, True, 4.0])
def test_a_width_that_cannot_be_read_is_refused(max_width: Any) -> None:
    with pytest.raises(InputError, match="2, 3, 4, 6, 8"):
        ReplicaOptions.from_additional_config({ADDITIONAL_CONFIG_KEY: {"max_width": max_width}})


@pytest.mark.parametrize("name", ["", "a b", 4.5, True, "x" * 65])
def test_a_malformed_default_is_refused(name: Any) -> None:
    with pytest.raises(InputError, match="is not a precision"):
        ReplicaOptions(default_precision=name)


@pytest.mark.parametrize("max_width", WIDTHS)
def test_the_catalogue_holds_what_the_width_allows_and_defaults_to_the_widest(max_width: int) -> None:
    catalogue = ReplicaOptions(max_width).catalogue(all_profiles(LAYERS, STORED, max_width))
    expected = [str(width) for width in (2, 3, 4, 6, 8) if width <= max_width] + (["mix-3.0"] if max_width >= 4 else [])
    assert list(catalogue.profiles) == expected
    assert catalogue.default == str(max_width)


@pytest.mark.parametrize("default", ["3", 3, "mix-3.0"])
def test_the_chosen_default_is_the_one_of_the_catalogue(default: Any) -> None:
    options = ReplicaOptions(8, default)
    assert options.catalogue(all_profiles(LAYERS, STORED, 8)).resolve(None) == str(default)


@pytest.mark.parametrize("default", ["4", "mix-3.0", "nonsense"])
def test_a_default_that_the_replica_cannot_serve_is_refused(default: str) -> None:
    with pytest.raises(InputError, match=f"'{default}' .*2, 3"):
        ReplicaOptions(3, default).catalogue(all_profiles(LAYERS, STORED, 3))


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("5", 5), ("6GiB", 6 << 30), ("1.5 KiB", 1536), ("500MB", 500_000_000), ("2G", 2 * 10**9)]
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size
    assert ReplicaOptions(memory_budget=text).memory_budget == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "6 gib", "0", 0, True, None, "0.1"])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(InputError, match="a size such as 6GiB"):
        parse_bytes(text)
