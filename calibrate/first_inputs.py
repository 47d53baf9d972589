"""What a model calls its first block with, found without running a block or loading more than the embeddings."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from calibrate.model import Block
from calibrate.weights_source import WeightsSource
from matgptq_vllm.core.errors import UnsupportedError

Call = Mapping[str, Any]
"""Keyword arguments of a block besides its hidden states: masks, rotary embeddings."""


@dataclass(frozen=True)
class FirstInputs:
    """Inputs of the blocks."""

    hidden: list[torch.Tensor]
    """Inputs of the first block: the compute type [batch, seq_len, hidden], one per batch, on the CPU."""

    calls: list[dict[int, Call]]
    """calls[block][batch size]: the same for all batches of that size."""


@torch.no_grad()
def capture_first_inputs(
    model: PreTrainedModel, blocks: Sequence[Block], source: WeightsSource, batches: Sequence[torch.Tensor], dtype: torch.dtype
) -> FirstInputs:
    """Run ``model`` up to its first block on every batch, and on to the last one, past the blocks, on some.

    Args:
        model: a skeleton; modules that the forward pass calls before the blocks get their weights while it runs.
        batches: tokens int64 [batch, seq_len] each; all of one size but the last.
        dtype: type of the embeddings, which blocks and rotary embeddings follow.

    Raises:
        UnsupportedError: blocks are called with other arguments that depend on the tokens.
    """
    hidden: list[torch.Tensor] = []
    calls: list[dict[int, Call]] = [{} for _ in blocks]
    sizes: list[int] = []
    with _weights_on_call(model, blocks, source, dtype), _recording(blocks) as recorder:
        for batch in batches:
            size = len(batch)
            # Arguments are kept for the first batch of a size, and compared with those of the second.
            to_the_end = sizes.count(size) < 2
            sizes.append(size)
            recorder.begin(to_the_end)
            with suppress(_Stopped):
                model(batch, use_cache=False)
            hidden.append(recorder.hidden)
            for index, call in enumerate(recorder.calls if to_the_end else []):
                if not _same(calls[index].setdefault(size, call), call):
                    raise UnsupportedError(
                        f"{blocks[index].name}: {type(blocks[index].module).__name__} is called with arguments that depend on "
                        "the text; such models cannot be calibrated"
                    )
    return FirstInputs(hidden, calls)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, in tuples, lists and dicts too, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


class _Stopped(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class _Recorder:
    """What the blocks are called with in one forward pass."""

    def __init__(self, num_blocks: int):
        self._last = num_blocks - 1
        self.begin(True)

    def begin(self, to_the_end: bool) -> None:
        """Forget the pass before; with ``to_the_end`` the next one goes on to the last block."""
        self._stop_after = self._last if to_the_end else 0
        self.hidden = torch.empty(0)
        self.calls: list[Call] = []

    def forward_of(self, index: int, module: nn.Module) -> Callable[..., torch.Tensor]:
        """A forward function that stands in for the block's."""
        names = list(inspect.signature(module.forward).parameters)

        def record(*args: Any, **kwargs: Any) -> torch.Tensor:
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            states = call.pop(names[0])
            if index == 0:
                self.hidden = states
            self.calls.append(call)
            if index == self._stop_after:
                raise _Stopped
            return states

        return record


@contextmanager
def _recording(blocks: Sequence[Block]) -> Iterator[_Recorder]:
    recorder = _Recorder(len(blocks))
    for index, block in enumerate(blocks):
        block.module.forward = recorder.forward_of(index, block.module)
    try:
        yield recorder
    finally:
        for block in blocks:
            del block.module.forward


@contextmanager
def _weights_on_call(model: nn.Module, blocks: Sequence[Block], source: WeightsSource, dtype: torch.dtype) -> Iterator[None]:
    """Within it, a module outside the blocks has its weights, in ``dtype``, from the first time it is called."""
    inside = {id(module) for block in blocks for module in block.module.modules()}
    hooks = []
    replaced: list[tuple[nn.Module, str, torch.Tensor]] = []

    def load(path: str, module: nn.Module) -> None:
        if any(module is loaded for loaded, _, _ in replaced):
            return
        for name, tensor in _own_weights(module).items():
            replaced.append((module, name, tensor))
            stored = source.read(f"{path}.{name}" if path else name).to("cpu")
            value = stored.to(dtype) if stored.is_floating_point() else stored
            setattr(module, name, nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value)

    for path, module in model.named_modules():
        if id(module) not in inside and _own_weights(module):
            hooks.append(module.register_forward_pre_hook(lambda module, _, path=path: load(path, module)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, tensor in replaced:
            setattr(module, name, tensor)


def _own_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of ``module`` itself."""
    buffers = module.named_buffers(recurse=False)
    persistent = {name: buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **persistent}


def _same(left: Any, right: Any) -> bool:
    """Whether two arguments are equal, tensors by value."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left is right or torch.equal(left, right)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return left is right or bool(left == right)
