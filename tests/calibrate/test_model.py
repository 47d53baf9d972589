import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from calibrate.model import find_blocks, load_config, load_model, skeleton
from matgptq_vllm.core.errors import InputError, UnsupportedError


def test_blocks_and_their_linear_layers_are_found(family_config):
    blocks = find_blocks(skeleton(family_config))
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert list(blocks[1].linears) == [
        f"model.layers.1.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]


def test_a_convolution_instead_of_a_linear_layer_is_refused_by_name_and_class():
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.attn\.c_attn: Conv1D\.weight \[24, 72\]"):
        find_blocks(skeleton(GPT2Config(n_embd=24, n_layer=3, n_head=2, vocab_size=50)))


def test_a_skeleton_has_no_large_weights_but_the_values_of_computed_buffers(family_dir):
    model, original = skeleton(load_config(family_dir)), load_model(family_dir)
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters() if parameter.ndim > 1} == {"meta"}
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(original.named_buffers()).keys()
    for name, buffer in original.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_a_folder_that_is_no_model_is_refused(tmp_path, llama_dir):
    with pytest.raises(InputError, match="is not a folder"):
        load_config(tmp_path / "missing")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(InputError, match="no-such-model"):
        load_config(tmp_path)


def test_a_quantized_model_is_refused(tmp_path, llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(InputError, match="quantized already"):
        load_config(tmp_path)


def test_missing_and_damaged_weights_are_refused(tmp_path, llama_dir):
    directory = shutil.copytree(llama_dir, tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="weights cannot be loaded"):
        load_model(directory)
    weights.unlink()
    with pytest.raises(InputError, match="weights cannot be loaded"):
        load_model(directory)


def test_a_weight_left_out_is_refused_and_not_filled_with_random_numbers(tmp_path, llama_dir):
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    directory = shutil.copytree(llama_dir, tmp_path / "model")
    model.save_pretrained(directory, state_dict=state)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(directory)
