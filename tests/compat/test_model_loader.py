"""compat.model_loader: which of vLLM's load formats can read a parent."""

import pytest
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from matgptq_vllm.compat.model_loader import DUMMY_FORMAT, LOAD_FORMATS, check_load_format
from matgptq_vllm.core.errors import UnsupportedError


@pytest.mark.parametrize("load_format", [*LOAD_FORMATS, DUMMY_FORMAT])
def test_formats_that_reach_the_parents_loader_pass(load_format: str) -> None:
    assert load_format in _LOAD_FORMAT_TO_MODEL_LOADER
    check_load_format(load_format)


@pytest.mark.parametrize("load_format", sorted({*_LOAD_FORMAT_TO_MODEL_LOADER} - {*LOAD_FORMATS, DUMMY_FORMAT}))
def test_every_other_format_of_vllm_is_refused(load_format: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{load_format}' cannot read a parent; use auto"):
        check_load_format(load_format)
