"""MatGPTQModelLoader: vLLM's default loader, except that of a parent it reads, and verifies, only the planes in use."""

import time
from collections.abc import Generator
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from matgptq_vllm.compat.replica import replica_of
from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.parent import QUANT_METHOD

LOAD_FORMATS = ("auto", "hf", "safetensors")
"""Load formats under which vLLM reads a Hugging Face folder of safetensors."""

DUMMY_FORMAT = "dummy"
"""Load format that fills the weights with random numbers, to measure speed."""


def check_load_format(load_format: str) -> None:
    """Raise UnsupportedError unless ``load_format`` is read by ``MatGPTQModelLoader``, or is the dummy one.

    Any other loader would find no planes and, since vLLM does not ask for every weight of a quantized model, would
    leave whatever was in memory.
    """
    if load_format not in (*LOAD_FORMATS, DUMMY_FORMAT):
        raise UnsupportedError(
            f"load format {load_format!r} cannot read a parent; use {', '.join(LOAD_FORMATS)}, or {DUMMY_FORMAT} to measure "
            "speed"
        )


def register_loader() -> None:
    """Put the loader in the place of vLLM's default one; calling it again changes nothing.

    ``register_model_loader`` is not used: it warns that a format is being replaced, in every process of every model,
    while a model of another quantization method is loaded here exactly as before.
    """
    loaders: dict[str, Any] = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format in LOAD_FORMATS:
        if loaders.get(load_format) is DefaultModelLoader:
            loaders[load_format] = MatGPTQModelLoader


class MatGPTQModelLoader(DefaultModelLoader):
    """Loader for parents; everything else is the default loader's."""

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        if model_config.quantization != QUANT_METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        vllm_config: VllmConfig = get_current_vllm_config()
        replica = replica_of(vllm_config)
        # The default loader logs how long loading took since then.
        self.counter_before_loading_weights = time.perf_counter()
        yield from replica.reader.tensors(replica.options.max_width)
