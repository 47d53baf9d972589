"""plugin.register: what vLLM knows afterwards, and what it does as before."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm.model_executor import model_loader
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

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
