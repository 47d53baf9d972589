"""A model whose units switch between widths: codes are held once, values are made when a unit changes its width.

What is held, with P weights in the quantized layers:

    codes and scales   about P bytes, on the device of the model, read from disk and checked once
    current values     P values of the model's type
    kept values        more values, up to a bound: a width that was read before is then set without any arithmetic
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from calibrate.evaluate.resident_parent import ResidentParent
from calibrate.evaluate.sliced_model import layer_values, load_profile_model
from calibrate.search.units import Genome, Unit, genome_profile
from matgptq_vllm.core.checkpoint import ParentReader


class DeviceParent(ResidentParent):
    """A parent whose quantized layers are held, as they are stored, on a device; their values are then made there."""

    def __init__(self, directory: str | Path, device: torch.device):
        super().__init__(directory)
        self._device = device

    @cached_property
    def _held(self) -> dict[str, torch.Tensor]:
        quantized = self._quantized_names()
        return {name: tensor.to(self._device) for name, tensor in self.tensors(self.max_width) if name in quantized}


class SwitchedModel:
    """The model that a parent is at a genome, which can be changed.

    Args:
        genome: widths to begin with.
        dtype: type of all weights, and of the arithmetic.
        kept_bytes: bound on values kept beside the current ones.
    """

    def __init__(
        self,
        reader: DeviceParent,
        units: Sequence[Unit],
        genome: Genome,
        dtype: torch.dtype,
        device: torch.device,
        kept_bytes: int,
    ):
        self._reader = reader
        self._units = units
        self._dtype = dtype
        self._device = device
        self._left = kept_bytes
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        # Loaded by a reader on the host: the loader of transformers expects its weights there.
        host = ParentReader(reader.directory)
        self.model: PreTrainedModel = load_profile_model(host, genome_profile("loaded", units, genome), dtype)
        self.model.to(device)  # type: ignore[arg-type]  # transformers types it for str only
        self._genome = genome

    def switch(self, genome: Genome) -> PreTrainedModel:
        """The model at ``genome``; only units whose width differs from the last call are touched."""
        for unit, old, new in zip(self._units, self._genome, genome, strict=True):
            if old != new:
                for layer in unit.layers:
                    linear = self.model.get_submodule(layer)
                    assert isinstance(linear, nn.Linear)
                    # Another tensor, not other contents: kept values are never copied, nor overwritten.
                    linear.weight.data = self._values(layer, new)
        self._genome = genome
        return self.model

    def _values(self, layer: str, width: int) -> torch.Tensor:
        """[N, K] of the model's type."""
        kept = self._kept.get((layer, width))
        if kept is None:
            kept = layer_values(self._reader, layer, width).to(device=self._device, dtype=self._dtype)
            if kept.nbytes <= self._left:
                self._left -= kept.nbytes
                self._kept[layer, width] = kept
        return kept
