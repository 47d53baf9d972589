"""A plain transformers model whose linear layers hold the weights that a profile of a parent has."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from calibrate.experts import separate_experts
from calibrate.model import skeleton
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.slicing import check_rule, dequantize


def load_sliced_model(directory: Path, profile_name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that a parent is at one profile, dequantized: the reference for every other way to run it.

    Args:
        directory: the parent.
        profile_name: a width, or a profile of the parent's table.
        dtype: type of all weights; values are computed in float32 and rounded to it.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FormatError: the folder is not a whole parent.
        InputError: it has no such profile.
    """
    reader = ParentReader(directory)
    return load_profile_model(reader, reader.profile(profile_name), dtype)


def load_profile_model(reader: ParentReader, profile: Profile, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As ``load_sliced_model``, of a parent already open."""
    config = parent_config(reader)
    config.dtype = dtype
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in reader.unquantized()}
    for name in reader.layers:
        state[f"{name}.weight"] = layer_values(reader, name, profile.widths[name]).to(dtype)
    # The class is what AutoModel picks; only a concrete class takes weights from memory, and it ties and buffers as usual.
    model = type(skeleton(config)).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    separate_experts(model)
    return model.eval().requires_grad_(False)


def parent_config(reader: ParentReader) -> PretrainedConfig:
    """Configuration of the model that a slice is: the parent's, without its quantization."""
    config = AutoConfig.from_pretrained(reader.directory, local_files_only=True)
    del config.quantization_config
    return config


def layer_values(reader: ParentReader, name: str, width: int) -> torch.Tensor:
    """Weights float32 [N, K] of the layer ``name`` read at ``width``, on the CPU."""
    codes, scales = reader.layer(name, width)
    return dequantize(codes, scales, width, check_rule(reader.spec.slice_rule), reader.spec.group_size)


@torch.no_grad()
def set_profile(model: PreTrainedModel, reader: ParentReader, profile: Profile) -> None:
    """Give ``model``, made by ``load_profile_model``, the weights of another profile, in place."""
    for name in reader.layers:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(layer_values(reader, name, profile.widths[name]))
