"""plugin.register: what vLLM knows afterwards, and what it does as before."""

import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from vllm.config import LoadConfig, VllmConfig
from vllm.model_executor import model_loader
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.model_loader import weight_utils
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from matgptq_vllm.compat.model_loader import LOAD_FORMATS, MatGPTQModelLoader
from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.parent import QUANT_METHOD, ParentSpec
from matgptq_vllm.plugin.config import MatGPTQConfig
from matgptq_vllm.plugin.register import register


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "matgptq"]
    assert found.load() is register


def test_registering_twice_is_registering_once() -> None:
    register()
    loaders = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    register()
    assert QUANTIZATION_METHODS.count(QUANT_METHOD) == 1
    assert get_quantization_config(QUANT_METHOD) is MatGPTQConfig
    assert loaders == model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    assert {name for name, loader in loaders.items() if loader is MatGPTQModelLoader} == set(LOAD_FORMATS)


def test_importing_the_plugin_registers_nothing() -> None:
    check = (
        "import matgptq_vllm.plugin.config, matgptq_vllm.compat.model_loader, matgptq_vllm.kernels.ops, torch\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "assert 'matgptq' not in QUANTIZATION_METHODS\n"
        "assert not hasattr(torch.ops.matgptq, 'sliced_linear')\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_a_parents_quantization_config_is_accepted() -> None:
    spec = ParentSpec(slice_rule="round", group_size=64)
    config = MatGPTQConfig.from_config(spec.to_dict())
    assert config.spec == spec
    assert config.get_name() == QUANT_METHOD
    assert config.get_config_filenames() == []


def test_another_checkpoints_quantization_config_is_refused() -> None:
    with pytest.raises(FormatError, match=r"config\.json: format_version is None"):
        MatGPTQConfig.from_config({"quant_method": QUANT_METHOD, "bits": 4, "group_size": 128})


def test_a_gpu_that_is_too_old_is_refused_when_the_engine_is_configured(monkeypatch) -> None:
    monkeypatch.setattr(weight_utils, "get_quant_config", lambda *_: MatGPTQConfig(ParentSpec()))
    monkeypatch.setattr(current_platform, "get_device_capability", lambda *_: DeviceCapability(7, 5))
    model = SimpleNamespace(quantization=QUANT_METHOD, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"matgptq is not supported for the current GPU. Minimum capability: 80. Current .*75"):
        VllmConfig._get_quantization_config(model, LoadConfig())
