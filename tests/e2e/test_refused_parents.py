"""Parents that must not be served: vLLM stops while loading, and says which file and which tensor is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from matgptq_vllm.cli import main

from .test_llm_api import run_engine

pytestmark = pytest.mark.engine

LOAD = "engine(sys.argv[1], **(PRECISION if {precision} else {{}}))\nprint('loaded')\n"


def truncate(parent: Path) -> list[str]:
    path = parent / "planes" / "plane4-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return [path.name, "proj.plane4"]


def flip_a_bit(parent: Path) -> list[str]:
    path = parent / "planes" / "plane0-00001-of-00001.safetensors"
    tensors = load_file(path)
    name = "model.layers.3.self_attn.k_proj.plane0"
    tensors[name][5, 7] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    return [path.name, name]


def another_models_config(parent: Path) -> list[str]:
    path = parent / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["slice_rule"] = "round"
    path.write_text(json.dumps(config))
    return [path.name, "quantization_config"]


def another_models_shape(parent: Path) -> list[str]:
    path = parent / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] = 1024
    path.write_text(json.dumps(config))
    return [path.name, "gate_proj"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, another_models_config, another_models_shape])
def test_a_damaged_parent_is_refused_at_load(
    profiled_parent: Path, tmp_path: Path, damage: Callable[[Path], list[str]]
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(profiled_parent, parent)
    named = damage(parent)
    # With and without the classes of per-request precision: plain ``LLM(DIR)`` verifies as well.
    result = run_engine(LOAD.format(precision=damage is flip_a_bit), parent)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    for name in named:
        assert name in result.stderr


def test_the_worker_refuses_a_model_that_is_no_parent(example_model: Path) -> None:
    result = run_engine(LOAD.format(precision=True), example_model)
    assert result.returncode != 0
    assert "matgptq calibrate" in result.stderr


def test_a_parent_with_experts_is_refused_by_name(example_model: Path, tmp_path: Path) -> None:
    model, parent = tmp_path / "model", tmp_path / "parent"
    tokenizer = AutoTokenizer.from_pretrained(example_model)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3MoeConfig(
        **sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=len(tokenizer), dtype=torch.bfloat16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert main(["calibrate", str(model), "--method", "rtn", "--group-size", "32", "--out", str(parent)]) == 0
    result = run_engine(LOAD.format(precision=False), parent)
    assert result.returncode != 0
    assert "model.layers.0.mlp.experts: parents of mixture-of-experts models cannot be served yet" in result.stderr
