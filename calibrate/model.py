"""Load a model, or its skeleton without weights; find its decoder blocks and their linear layers.

Nothing here knows an architecture: blocks are the list of modules whose length the configuration announces as the
number of layers, and what is quantized in them is every ``nn.Linear`` but the routers of mixtures of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from calibrate.experts import Expert, mixtures, routers, separate_experts
from matgptq_vllm.core.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    name: str
    """Path in the model, as in ``model.layers.3``."""

    module: nn.Module
    linears: Mapping[str, nn.Linear]
    """Full name of each linear layer, as in the checkpoint without ``.weight``, in the order of the module tree."""

    parallel: tuple[frozenset[str], ...] = ()
    """Sets of layers whose inputs do not depend on each other, so that one forward pass can see them all (experts)."""

    experts: Mapping[str, Expert] = field(default_factory=dict)
    """The expert of each layer that is one's: it knows which tokens the layer's inputs belong to."""


def load_config(directory: Path) -> PretrainedConfig:
    """The configuration in a model folder.

    Raises:
        InputError: not a folder of a Hugging Face model, or the model is quantized already.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder; download the model first and give the folder it lies in")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json: not a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise InputError(f"{directory}/config.json: {_first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise InputError(f"{directory} is quantized already; calibrate the original model")
    return config


def load_model(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model in a folder, on the CPU, in evaluation mode.

    Args:
        dtype: type of the weights; ``auto`` keeps the stored one.

    Raises:
        InputError: as ``load_config``, or the weights are missing or damaged.
    """
    load_config(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise whatever their parsers raise
        raise InputError(f"{directory}: its weights cannot be loaded: {_first_line(error)}") from error
    model, loading = loaded
    absent = sorted(loading["missing_keys"]) or sorted(map(str, loading["mismatched_keys"]))
    if absent:
        # transformers would fill these with random numbers.
        raise InputError(f"{directory}: weights are missing or of another shape: {', '.join(absent[:4])}; copy the model again")
    separate_experts(model)
    return model.eval().requires_grad_(False)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of ``config`` in evaluation mode, without memory for its large weights; computed buffers have values."""
    try:
        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    except ValueError as error:
        raise UnsupportedError(
            f"{config.model_type}: not a causal language model of transformers: {_first_line(error)}"
        ) from error
    separate_experts(model)
    return model


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of ``model``, in order.

    Raises:
        UnsupportedError: no list of blocks, or a block has weights that are not those of an ``nn.Linear`` (convolutions,
            experts of an unknown form); the message names the module and its class.
    """
    num_blocks = model.config.get_text_config().num_hidden_layers
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == num_blocks and _holds_weights(modules):
            return [_block(f"{name}.{index}", module) for index, module in enumerate(modules)]
    raise UnsupportedError(
        f"{type(model).__name__} has no list of {num_blocks} decoder blocks; models built like Llama, Qwen and Mistral are"
    )


class _EmptyOnMeta(TorchFunctionMode):
    """Within it, ``torch.empty``, which makes the weights of modules, takes no memory; computed buffers are real.

    The meta device as a context would leave rotary frequencies without values, and no file holds them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _holds_weights(modules: nn.ModuleList) -> bool:
    return all(any(parameter.ndim >= 2 for parameter in module.parameters()) for module in modules)


def _block(name: str, module: nn.Module) -> Block:
    linears = {}
    unquantized: set[nn.Module] = set()
    experts: dict[str, Expert] = {}
    parallel = []
    for path, holder, mixture in mixtures(module, name):
        unquantized |= routers(holder, mixture)
        sets: tuple[set[str], set[str]] = set(), set()
        for index, expert in mixture.named_children():
            assert isinstance(expert, Expert)
            for names, leaves in zip(sets, expert.layers, strict=True):
                layers = {f"{path}.{index}.{leaf}" for leaf in leaves}
                names |= layers
                experts.update(dict.fromkeys(layers, expert))
        parallel += [frozenset(names) for names in sets]
    for path, child in module.named_modules(prefix=name):
        if child in unquantized:
            continue
        if isinstance(child, nn.Linear):
            linears[path] = child
            continue
        for parameter_name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                raise UnsupportedError(
                    f"{path}: {type(child).__name__}.{parameter_name} {list(parameter.shape)} cannot be quantized; "
                    "only blocks whose weights are all nn.Linear, or experts like Qwen3-MoE's and Mixtral's, are supported"
                )
    return Block(name, module, linears, tuple(parallel), experts)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
