"""compat.model_loader: which of vLLM's load formats can read a parent, and what is logged of it."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from matgptq_vllm.compat.model_loader import DUMMY_FORMAT, LOAD_FORMATS, MatGPTQModelLoader, check_load_format
from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.parent import QUANT_METHOD


@pytest.mark.parametrize("load_format", [*LOAD_FORMATS, DUMMY_FORMAT])
def test_formats_that_reach_the_parents_loader_pass(load_format: str) -> None:
    assert load_format in _LOAD_FORMAT_TO_MODEL_LOADER
    check_load_format(load_format)


@pytest.mark.parametrize("load_format", sorted({*_LOAD_FORMAT_TO_MODEL_LOADER} - {*LOAD_FORMATS, DUMMY_FORMAT}))
def test_every_other_format_of_vllm_is_refused(load_format: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{load_format}' cannot read a parent; use auto"):
        check_load_format(load_format)


def test_the_time_that_vllm_logs_begins_when_a_parent_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(1)
    reader = SimpleNamespace(tensors=lambda max_width: iter([("weight", weight)]))
    replica = SimpleNamespace(reader=reader, options=SimpleNamespace(max_width=8))
    monkeypatch.setattr("matgptq_vllm.compat.model_loader.get_current_vllm_config", lambda: None)
    monkeypatch.setattr("matgptq_vllm.compat.model_loader.replica_of", lambda vllm_config: replica)
    loader, config, before = MatGPTQModelLoader(LoadConfig()), SimpleNamespace(quantization=QUANT_METHOD), time.perf_counter()
    model: Any = None
    assert list(loader.get_all_weights(config, model)) == [("weight", weight)]  # type: ignore[arg-type]
    assert before <= loader.counter_before_loading_weights <= time.perf_counter()
