"""ElasticLayer: a layer's part in dropping planes and reading them again while the engine runs (``engine.elastic``).

A layer is one tensor-parallel rank's share of the parent's layers that vLLM fuses. How shares are cut is vLLM's affair: planes
read again pass through the same weight loader as the first time, where the kernels run into a staging tensor in the checkpoint
layout, from which the kernel layout is made.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.parameter import ModelWeightParameter

from matgptq_vllm.core.checkpoint import ParentReader, plane_name
from matgptq_vllm.core.shapes import KERNEL_PLANE_WIDTHS, leading_planes
from matgptq_vllm.kernels.resident import write_kernel_planes


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers. PyTorch keeps freed memory for the stream that it was taken for: with a stream per layer, staging
    tensors would add up to all that is read."""
    return torch.cuda.Stream(device)


class ElasticLayer:
    """One layer.

    Args:
        reader: the parent.
        members: checkpoint names of the layers fused into this one, in order.
        layer: vLLM's module, loaded.
        weight_loader: vLLM's, for a plane of this layer.
        profile_widths: int32, on the CPU: the layer's width in every profile, when all planes are held.
        n: outputs of this rank.
        k: inputs of this rank.
    """

    def __init__(
        self,
        reader: ParentReader,
        members: Sequence[str],
        layer: Any,
        weight_loader: Any,
        profile_widths: torch.Tensor,
        n: int,
        k: int,
    ):
        self._reader = reader
        self._layer = layer
        self._weight_loader = weight_loader
        self._profile_widths = profile_widths.clone()
        self._n, self._k = n, k
        shards: Sequence[tuple[Any, ...]] = [()]
        if len(members) > 1:
            shards = [("q",), ("k",), ("v",)] if isinstance(layer, QKVParallelLinear) else [(i,) for i in range(len(members))]
        self._members = list(zip(members, shards, strict=True))

    def limit(self, max_width: int) -> None:
        """See ``engine.elastic``. The tables keep their addresses: CUDA graphs read them."""
        widths = self._profile_widths.clamp(max=max_width)
        self._layer.host_profile_widths.copy_(widths)
        self._layer.profile_widths.copy_(widths)

    def load(self, planes: range) -> None:
        """See ``engine.elastic``."""
        held = [getattr(self._layer, plane_name(plane)) for plane in planes]
        if held[0].dtype == torch.uint8:
            for plane, parameter in zip(planes, held, strict=True):
                self._read(plane, parameter)
            return
        device = held[0].device
        # The engine's steps go on in their own stream meanwhile.
        stream = _stream(device) if device.type == "cuda" else None
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self._load_kernel_planes(planes, [parameter.data for parameter in held])
        if stream is not None:
            stream.synchronize()

    def _load_kernel_planes(self, planes: range, targets: Sequence[torch.Tensor]) -> None:
        """Kernel planes begin and end where planes of every checkpoint do: at the widths. The signs are in plane 0."""
        layout = self._reader.layout
        first = leading_planes(layout.plane_widths, sum(KERNEL_PLANE_WIDTHS[: planes.start]))
        stop = leading_planes(layout.plane_widths, sum(KERNEL_PLANE_WIDTHS[: planes.stop]))
        staged = {}
        for plane in (0, *range(first, stop)):
            data = torch.empty(self._n, layout.packed_columns(plane, self._k), dtype=torch.uint8, device=targets[0].device)
            parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=self._weight_loader)
            self._read(plane, parameter)
            staged[plane] = parameter.data
        write_kernel_planes(staged, layout, self._k, dict(zip(planes, targets, strict=True)))

    def _read(self, plane: int, parameter: Any) -> None:
        for member, shard in self._members:
            parameter.weight_loader(parameter, self._reader.plane(member, plane), *shard)
