"""core.parent: the spec and its way through ``quantization_config``."""

import itertools
import json
from typing import Any

import pytest

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.parent import (
    FORMAT_VERSION,
    GROUP_SIZES,
    QUANT_METHOD,
    SCALE_DTYPES,
    SLICE_RULE_NAMES,
    ParentSpec,
)
from matgptq_vllm.core.planes import DEFAULT_PLANE_WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES

REFUSED: list[tuple[str, list[Any]]] = [
    ("slice_rule", ["floor", "", None, 1, ["nested"], "NESTED"]),
    ("group_size", [0, 1, 16, 127, 256, -2, None, "128", 128.0, True, [128]]),
    ("scale_dtype", ["float64", "bf16", "", None, "torch.bfloat16", 16]),
    ("symmetric", [False, None, 1, "true"]),
    ("plane_widths", [None, 8, 2.5]),
    ("quant_method", ["gptq", "MATGPTQ", None, 1, ""]),
    ("format_version", [0, 1, 3, "2", None]),
]


@pytest.mark.parametrize(
    ("rule", "group_size", "dtype", "planes"),
    list(itertools.product(SLICE_RULE_NAMES, GROUP_SIZES, SCALE_DTYPES, [(2, 1, 1, 2, 2), (1,) * 8])),
)
def test_every_spec_survives_the_way_through_json(rule: str, group_size: int, dtype: str, planes: tuple[int, ...]) -> None:
    spec = ParentSpec(rule, group_size, planes, dtype)
    assert ParentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_config_of_a_default_parent_is_as_documented() -> None:
    assert ParentSpec().to_dict() == {
        "quant_method": "matgptq",
        "format_version": 2,
        "slice_rule": "nested",
        "group_size": 128,
        "plane_widths": [2, 1, 1, 2, 2],
        "scale_dtype": "bfloat16",
        "symmetric": True,
    }


def test_names_stated_here_for_want_of_torch_equal_those_of_the_arithmetic() -> None:
    assert SLICE_RULE_NAMES == SLICE_RULES
    assert ParentSpec().plane_widths == DEFAULT_PLANE_WIDTHS


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED for value in values])
def test_a_field_out_of_range_is_refused_with_its_name_and_source(name: str, value: Any) -> None:
    config = {**ParentSpec().to_dict(), name: value}
    with pytest.raises(FormatError, match=r"some\.json") as caught:
        ParentSpec.from_dict(config, source="some.json")
    if name != "plane_widths":
        assert name in str(caught.value)
        assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", list(ParentSpec().to_dict()))
def test_a_missing_field_is_refused(name: str) -> None:
    config = ParentSpec().to_dict()
    del config[name]
    with pytest.raises(FormatError, match=name):
        ParentSpec.from_dict(config)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(FormatError, match="zero_point"):
        ParentSpec.from_dict({**ParentSpec().to_dict(), "zero_point": 1})


def test_a_newer_format_says_which_version_is_read() -> None:
    with pytest.raises(FormatError, match=f"99, this release reads {FORMAT_VERSION}"):
        ParentSpec.from_dict({**ParentSpec().to_dict(), "format_version": 99})


def test_another_method_says_whose_files_are_read() -> None:
    with pytest.raises(FormatError, match=f"'awq', a parent has '{QUANT_METHOD}'"):
        ParentSpec.from_dict({"quant_method": "awq", "bits": 4})


@pytest.mark.parametrize(("name", "values"), REFUSED[:4])
def test_the_constructor_blames_its_caller_and_lists_what_is_allowed(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"{name} .* use one of"):
            ParentSpec(**{name: value})
