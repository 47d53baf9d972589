import pytest
import torch

from calibrate.evaluate.sliced_model import load_profile_model, load_sliced_model, set_profile
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.slicing import dequantize


@pytest.fixture
def parent(tiny_options):
    directory = run_calibration(tiny_options())
    layers = ParentReader(directory).layers
    write_profiles(directory, [Profile("mix-3.0", {name: 2 if "layers.0" in name else 4 for name in layers})])
    return directory


@pytest.mark.parametrize("name", ["2", "3", "4", "6", "8", "mix-3.0"])
def test_linear_layers_hold_the_values_of_the_profile(parent, name):
    reader = ParentReader(parent)
    model = load_sliced_model(parent, name)
    for layer, width in reader.profile(name).widths.items():
        expected = dequantize(*reader.layer(layer), width, reader.spec.slice_rule, 32)
        assert torch.equal(model.get_submodule(layer).weight, expected)
    others = dict(reader.unquantized())
    assert torch.equal(model.get_parameter("model.norm.weight"), others["model.norm.weight"].float())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_changing_the_profile_is_loading_it(parent):
    reader = ParentReader(parent)
    tokens = torch.arange(24).view(2, 12)
    model = load_profile_model(reader, reader.profile("8"))
    set_profile(model, reader, reader.profile("mix-3.0"))
    assert torch.equal(model(tokens).logits, load_sliced_model(parent, "mix-3.0")(tokens).logits)


def test_the_type_asked_for_is_that_of_all_weights(parent):
    assert {parameter.dtype for parameter in load_sliced_model(parent, "4", torch.bfloat16).parameters()} == {torch.bfloat16}


def test_an_unknown_profile_or_a_folder_that_is_no_parent_is_refused(parent, llama_dir):
    with pytest.raises(InputError, match=r"mix-3\.0"):
        load_sliced_model(parent, "mix-9")
    with pytest.raises(FormatError, match="not a parent"):
        load_sliced_model(llama_dir, "4")
