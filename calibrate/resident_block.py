"""One block with its weights on the device. Its linear layers can hold the weights of each stream in turn."""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from calibrate.first_inputs import Call
from calibrate.model import Block
from calibrate.weights_source import WeightsSource
from matgptq_vllm.core.errors import InputError

Stream: TypeAlias = int | None
"""The model whose activations these are: None is the original, a width is the model read at that width."""


class ResidentBlock:
    """Context manager: within it the block may have weights, afterwards it is a skeleton again.

    Args:
        block: of a skeleton.
        device: where the weights lie.
        dtype: type in which the block computes.
        streams: the streams besides the original.
    """

    def __init__(self, block: Block, device: torch.device, dtype: torch.dtype, streams: Sequence[int]):
        self.block = block
        self.device = device
        self._dtype = dtype
        self.stored: dict[str, torch.Tensor] = {}
        """Original weight of each linear layer in its stored type, [N, K] on the device."""
        self._weights: dict[Stream, dict[str, torch.Tensor]] = {stream: {} for stream in (None, *streams)}

    def __enter__(self) -> "ResidentBlock":
        return self

    def __exit__(self, *_: object) -> None:
        self.block.module.to("meta")
        self.stored.clear()
        self._weights.clear()

    def load(self, source: WeightsSource) -> None:
        """Give the block its weights, the original's in every stream.

        Raises:
            InputError: a linear layer has NaN or infinite weights.
        """
        state = {}
        for key in self.block.module.state_dict():
            name = f"{self.block.name}.{key}"
            stored = source.read(name).to(self.device)
            layer = name.removesuffix(".weight")
            if layer in self.block.linears and name.endswith(".weight"):
                check_finite(stored, layer, "weights")
                self.stored[layer] = stored
            state[key] = stored.to(self._dtype) if stored.is_floating_point() else stored
        self.block.module.load_state_dict(state, strict=True, assign=True)
        self.block.module.to(self.device)
        for weights in self._weights.values():
            weights.update({name: linear.weight.data for name, linear in self.block.linears.items()})

    def set_values(self, stream: int, name: str, values: torch.Tensor) -> None:
        """Give the layer ``name`` the weights ``values``, floating [N, K], in one stream."""
        self._weights[stream][name] = values.to(device=self.device, dtype=self._dtype)

    @torch.no_grad()
    def run(self, stream: Stream, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Output of the block in a stream for inputs [batch, seq_len, hidden] -> same shape and type."""
        for name, weight in self._weights[stream].items():
            self.block.linears[name].weight.data = weight
        output = self.block.module(hidden, **call)
        return output[0] if isinstance(output, tuple) else output


def check_finite(values: torch.Tensor, name: str, kind: str) -> None:
    """InputError naming the layer ``name`` if any of ``values`` is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise InputError(f"{name}: its {kind} hold NaN or infinite values; the model cannot be calibrated, check its files")
