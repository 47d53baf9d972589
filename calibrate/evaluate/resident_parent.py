"""A parent held in memory, for work that reads it at many profiles: every tensor is read and hashed once."""

from functools import cached_property
from pathlib import Path

import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.precision import PARENT_WIDTH


class ResidentParent(ParentReader):
    """A ``ParentReader`` whose quantized layers, once asked for, stay in memory as they are stored.

    It takes a reader's place everywhere, so that ``layer_values`` stays the one way to a layer's values. It holds about
    one byte per weight, a quarter of the float32 model that a profile is read into: where that model fits, so does this.

    Args:
        directory: the parent.
        max_width: widest width that will be read; planes beyond it stay on disk.

    Raises:
        InputError, FormatError: as ``ParentReader``.
    """

    def __init__(self, directory: str | Path, max_width: int = PARENT_WIDTH):
        super().__init__(directory)
        self.max_width = max_width

    @cached_property
    def _held(self) -> dict[str, torch.Tensor]:
        quantized = self._quantized_names()
        return {name: tensor for name, tensor in self.tensors(self.max_width) if name in quantized}

    def _tensor(self, name: str) -> torch.Tensor:
        held = self._held.get(name)
        return super()._tensor(name) if held is None else held
