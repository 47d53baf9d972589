import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibrate.model import load_config, load_model, skeleton
from calibrate.weights_source import SafetensorsSource, unquantized
from matgptq_vllm.core.errors import InputError


def source_of(directory: Path) -> SafetensorsSource:
    return SafetensorsSource(directory, skeleton(load_config(directory)))


def rewritten(directory: Path, to: Path, change) -> Path:
    """A copy of a model folder in which the weights are what ``change`` makes of them."""
    copy = shutil.copytree(directory, to)
    save_file(change(load_file(directory / "model.safetensors")), copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_every_weight_is_read_as_stored(family_dir):
    source = source_of(family_dir)
    assert source.files == ["model.safetensors"]
    for name, parameter in load_model(family_dir).named_parameters():
        assert torch.equal(source.read(name), parameter)


def test_shards_are_found_through_their_index(llama_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama_dir).save_pretrained(tmp_path, max_shard_size="30KB")
    source = source_of(tmp_path)
    assert len(source.files) > 2
    for name, parameter in load_model(llama_dir).named_parameters():
        assert torch.equal(source.read(name), parameter)


def test_tied_weights_are_found_under_either_name_and_exported_once(llama_dir, tmp_path):
    def rename(weights):
        return {("lm_head.weight" if "embed" in name else name): tensor for name, tensor in weights.items()}

    directory = rewritten(llama_dir, tmp_path / "model", rename)
    source = source_of(directory)
    expected = load_model(llama_dir).lm_head.weight
    assert torch.equal(source.read("model.embed_tokens.weight"), expected)
    assert torch.equal(source.read("lm_head.weight"), expected)
    names = [name for name, _ in unquantized(skeleton(load_config(directory)), source, set())]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_names_without_the_prefix_of_the_base_model_are_found(llama_dir, tmp_path):
    def strip(weights):
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}

    source = source_of(rewritten(llama_dir, tmp_path / "model", strip))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), load_model(llama_dir).get_parameter(name))


def test_unquantized_weights_keep_the_type_that_they_are_stored_in(llama_dir, tmp_path):
    def widen(weights):
        return {name: tensor.float() if "norm" in name else tensor for name, tensor in weights.items()}

    directory = rewritten(llama_dir, tmp_path / "model", widen)
    model = skeleton(load_config(directory))
    others = dict(unquantized(model, source_of(directory), {"model.layers.0.mlp.up_proj"}))
    assert "model.layers.0.mlp.up_proj.weight" not in others
    assert others["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert others["model.norm.weight"].dtype == torch.float32


def test_weights_that_are_missing_or_of_another_shape_are_refused_by_name(llama_dir, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    without = rewritten(llama_dir, tmp_path / "a", lambda weights: {key: weights[key] for key in weights if key != name})
    other = rewritten(llama_dir, tmp_path / "b", lambda weights: weights | {name: torch.zeros(3, 4)})
    for directory in (without, other):
        with pytest.raises(InputError, match=r"missing or of another shape: model\.layers\.1\.mlp\.up_proj\.weight; copy"):
            source_of(directory)


def test_missing_and_damaged_files_are_refused(llama_dir, tmp_path):
    directory = shutil.copytree(llama_dir, tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"weights cannot be loaded: model\.safetensors: "):
        source_of(directory)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing; only safetensors files are read"):
        source_of(directory)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(InputError, match=r"model-00001-of-00001\.safetensors is missing"):
        source_of(directory)
    index.write_text("[]")
    with pytest.raises(InputError, match="is no index"):
        source_of(directory)
