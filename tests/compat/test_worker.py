"""compat.worker: what a worker refuses before vLLM starts it. What it does then is in tests/e2e."""

from types import SimpleNamespace

import pytest

from matgptq_vllm.compat import worker
from matgptq_vllm.compat.worker import MatGPTQWorker
from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.parent import QUANT_METHOD


def make_worker(monkeypatch: pytest.MonkeyPatch, quantization: str | None, stages: int) -> MatGPTQWorker:
    """A worker of a CPU that nobody has configured but for what it looks at first."""
    monkeypatch.setattr(worker.current_platform.__class__, "is_cpu", lambda _: True)
    made = object.__new__(MatGPTQWorker)
    made.model_config = SimpleNamespace(model="some/model", quantization=quantization)
    made.parallel_config = SimpleNamespace(pipeline_parallel_size=stages)
    return made


def test_a_model_that_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"some/model: the model's quantization is 'awq'; .*matgptq calibrate"):
        make_worker(monkeypatch, "awq", 1).init_device()


def test_a_pipeline_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"pipeline_parallel_size is 2, .*use tensor_parallel_size"):
        make_worker(monkeypatch, QUANT_METHOD, 2).init_device()


def test_weights_of_another_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"'/other'.*some/model"):
        make_worker(monkeypatch, QUANT_METHOD, 1).reload_weights(weights_path="/other")
