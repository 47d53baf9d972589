"""Load a model, find its decoder blocks and their linear layers, capture the first block's inputs, replay one block.

Nothing here knows an architecture: blocks are the list of modules whose length the configuration announces as the
number of layers, and what is quantized in them is every ``nn.Linear``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from matgptq_vllm.core.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    name: str
    """Path in the model, as in ``model.layers.3``."""

    module: nn.Module
    linears: Mapping[str, nn.Linear]
    """Full name of each linear layer, as in the checkpoint without ``.weight``, in the order of the module tree."""


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks are called with."""

    hidden: list[torch.Tensor]
    """Inputs of the first block: float32 [batch, seq_len, hidden], one per batch."""

    calls: list[list[Mapping[str, Any]]]
    """Other keyword arguments (masks, rotary embeddings): calls[block][batch]."""


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
    return model.eval().requires_grad_(False)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of ``config`` without memory for its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedError(
            f"{config.model_type}: not a causal language model of transformers: {_first_line(error)}"
        ) from error


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of ``model``, in order.

    Raises:
        UnsupportedError: no list of blocks, or a block has weights that are not those of an ``nn.Linear``
            (mixture-of-experts tensors, convolutions); the message names the module and its class.
    """
    num_blocks = model.config.get_text_config().num_hidden_layers
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == num_blocks and _holds_weights(modules):
            return [_block(f"{name}.{index}", module) for index, module in enumerate(modules)]
    raise UnsupportedError(
        f"{type(model).__name__} has no list of {num_blocks} decoder blocks; models built like Llama, Qwen and Mistral are"
    )


def capture_inputs(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[torch.Tensor]) -> BlockInputs:
    """What ``model`` calls its blocks with, without running any block.

    Args:
        batches: tokens int64 [batch, seq_len] each.
    """
    # Blocks and rotary embeddings follow the type of the embeddings; float32 here makes all arithmetic float32.
    model.get_input_embeddings().float()
    hidden: list[torch.Tensor] = []
    calls: list[list[Mapping[str, Any]]] = [[] for _ in blocks]

    def recorder(index: int) -> Callable[..., torch.Tensor]:
        def record(*args: Any, **kwargs: Any) -> torch.Tensor:
            states = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                hidden.append(states.detach())
            calls[index].append(kwargs)
            if index == len(blocks) - 1:
                raise _LastBlockReached
            return states

        return record

    for index, block in enumerate(blocks):
        block.module.forward = recorder(index)
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    model(batch, use_cache=False)
                except _LastBlockReached:
                    continue
    finally:
        for block in blocks:
            del block.module.forward
    return BlockInputs(hidden, calls)


@torch.no_grad()
def replay(block: Block, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
    """Output of one block for inputs [batch, seq_len, hidden] -> same shape and type."""
    output = block.module(hidden, **call)
    return output[0] if isinstance(output, tuple) else output


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, in tuples, lists and dicts too, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


class _LastBlockReached(Exception):
    """Ends a forward pass whose only purpose was to see what the blocks are called with."""


def _holds_weights(modules: nn.ModuleList) -> bool:
    return all(any(parameter.ndim >= 2 for parameter in module.parameters()) for module in modules)


def _block(name: str, module: nn.Module) -> Block:
    linears = {}
    for path, child in module.named_modules(prefix=name):
        if isinstance(child, nn.Linear):
            linears[path] = child
            continue
        for parameter_name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                raise UnsupportedError(
                    f"{path}: {type(child).__name__}.{parameter_name} {list(parameter.shape)} cannot be quantized; "
                    "only blocks whose weights are all nn.Linear are supported"
                )
    return Block(name, module, linears)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
