"""MatGPTQLinearMethod: a vLLM linear layer whose weights are the leading planes of a parent.

Parameters of a layer on one tensor-parallel rank while it is loaded, with N outputs and K inputs of that rank:

    name      dtype            shape            sharded on
    plane{i}  uint8            [N, packed K]    N (column parallel, fused), K (row parallel)
    scales    the parent's     [N, groups]      N, and K unless there is one scale per channel

After loading, where the kernels run, they are replaced by those of the kernel layout, under the same names.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from matgptq_vllm.core.checkpoint import SCALES, plane_name
from matgptq_vllm.core.errors import FormatError, UnsupportedError
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE
from matgptq_vllm.core.planes import K_ALIGNMENT
from matgptq_vllm.core.slicing import check_rule, num_groups
from matgptq_vllm.engine.replica import Replica
from matgptq_vllm.kernels.resident import kernels_run, to_resident
from matgptq_vllm.plugin.elastic_layer import ElasticLayer

CACHED_BYTES = 1 << 30
"""Memory that PyTorch may keep for itself while layers are converted."""

if TYPE_CHECKING:
    from matgptq_vllm.kernels.compile_ahead import LayerKind


@register_weight_loader_v2_supported_method
class MatGPTQLinearMethod(LinearMethodBase):
    """Linear method of one layer of the engine.

    Args:
        replica: the parent being served.
        members: checkpoint names of the layers fused into this one, in order.
    """

    def __init__(self, replica: Replica, members: list[str]):
        self._replica = replica
        self._members = members
        self._num_planes = replica.num_planes  # as ``apply`` finds them

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the planes that this replica holds, the scales, and the layer's width in every profile.

        Raises:
            FormatError: the model's shape is not the parent's.
            UnsupportedError: tensor parallelism would cut a group, or a byte, in two.
        """
        reader = self._replica.reader
        n, k = sum(output_partition_sizes), input_size_per_partition
        self._check_shapes(layer, input_size, output_size)
        self._check_partition(input_size, k)
        self._n, self._k, self._dtype = n, k, params_dtype
        self._weight_loader = weight_loader = extra_weight_attrs.pop("weight_loader")

        for plane in range(self._replica.num_planes):
            shape = (n, reader.layout.packed_columns(plane, k))
            # Where the kernels run, this is given up after loading.
            on_cpu = torch.get_default_device().type == "cpu"
            data = self._replica.new_plane(plane, shape, torch.uint8) if on_cpu else torch.empty(shape, dtype=torch.uint8)
            parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
            layer.register_parameter(plane_name(plane), parameter)
            set_weight_attrs(parameter, extra_weight_attrs)

        data = torch.empty(n, num_groups(k, reader.spec.group_size), dtype=getattr(torch, reader.spec.scale_dtype))
        if reader.spec.group_size == -1:
            scales: BasevLLMParameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=weight_loader)
        else:
            scales = GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        layer.register_parameter(SCALES, scales)
        set_weight_attrs(scales, extra_weight_attrs)

        self._register_buffers(layer, data.device)

    def _register_buffers(self, layer: Any, device: torch.device) -> None:
        """What ``apply`` passes on besides weights; those of a step belong to all layers."""
        profile_widths = self._replica.profile_widths(self._members)
        # Every uniform profile is there, so the widths do not depend on the profile table either.
        layer.widths = profile_widths.unique().tolist()
        step = self._replica.step_buffers(get_current_vllm_config().scheduler_config.max_num_batched_tokens, device)
        buffers = {
            "profile_widths": profile_widths.to(device),
            "host_profile_widths": profile_widths,
            "token_profiles": step.token_profiles,
            "row_order": step.row_order,
            "step_profiles": step.step_profiles,
            "graph_profile": step.graph_profile,
            "locks": torch.empty(0, dtype=torch.int32, device=device),
            # Empty: vLLM's LoRA layers find the device of a quantized layer by a weight of this name.
            "qweight": torch.empty(0, device=device),
        }
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer, persistent=False)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the layer into the kernel layout where the kernels run; UnsupportedError on a GPU that is too old."""
        if kernels_run(layer.scales.device, self._dtype):
            self._to_kernel_layout(layer)
        if self._replica.elastic is not None:
            widths = layer.host_profile_widths
            self._replica.elastic.add(
                ElasticLayer(self._replica.reader, self._members, layer, self._weight_loader, widths, self._n, self._k)
            )

    def _to_kernel_layout(self, layer: Any) -> None:
        reader = self._replica.reader
        # Runs again when vLLM reloads the weights, which begins from what ``create_weights`` made.
        planes = [getattr(layer, plane_name(plane)).data for plane in range(self._replica.num_planes)]
        resident = to_resident(planes, layer.scales.data, reader.layout, self._k, reader.spec.group_size)
        for plane in range(self._replica.num_planes):
            delattr(layer, plane_name(plane))
        self._num_planes = len(resident.planes)
        for plane, converted in enumerate(resident.planes):
            data = converted
            if self._replica.elastic is not None:
                with converted.device:
                    data = self._replica.new_plane(plane, converted.shape, converted.dtype).copy_(converted)
            layer.register_parameter(plane_name(plane), torch.nn.Parameter(data, requires_grad=False))
        layer.register_parameter(SCALES, torch.nn.Parameter(resident.scales, requires_grad=False))
        layer.locks = resident.locks
        _give_back_cached(layer.scales.device)

    def kernel_kind(self, layer: Any) -> "LayerKind | None":
        """What the kernels of the layer depend on; None where none run."""
        if not layer.locks.numel():
            return None
        # Needs Triton, which a machine without a GPU may not have.
        from matgptq_vllm.kernels.compile_ahead import LayerKind

        spec = self._replica.reader.spec
        dtype, scale_dtype = (str(dtype).removeprefix("torch.") for dtype in (self._dtype, layer.scales.dtype))
        rule = check_rule(spec.slice_rule)
        return LayerKind(self._n, self._k, tuple(layer.widths), spec.group_size, rule, dtype, scale_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], every row at the width of its token's profile."""
        spec = self._replica.reader.spec
        y: torch.Tensor = torch.ops.matgptq.sliced_linear(
            x.reshape(-1, x.shape[-1]),
            [getattr(layer, plane_name(plane)) for plane in range(self._num_planes)],
            layer.scales,
            self._n,
            layer.token_profiles,
            layer.profile_widths,
            layer.row_order,
            layer.step_profiles,
            layer.host_profile_widths,
            layer.locks,
            layer.widths,
            list(spec.plane_widths),
            spec.group_size,
            spec.slice_rule,
            bias,
            layer.graph_profile,
        )
        return y.reshape(*x.shape[:-1], -1)

    def _check_shapes(self, layer: torch.nn.Module, input_size: int, output_size: int) -> None:
        shapes = {name: self._replica.reader.layers[name] for name in self._members}
        outputs = sum(n for n, _ in shapes.values())
        # With more tensor-parallel ranks than key/value heads, vLLM repeats those heads: more outputs than the parent has.
        fits = output_size >= outputs if isinstance(layer, QKVParallelLinear) else output_size == outputs
        if not fits or any(k != input_size for _, k in shapes.values()):
            raise FormatError(
                f"{CONFIG_FILE}: the model has {output_size} outputs and {input_size} inputs where {MANIFEST_FILE} has "
                f"{shapes}; one of the files was altered"
            )

    def _check_partition(self, input_size: int, k: int) -> None:
        group_size = self._replica.reader.spec.group_size
        # One scale per channel is no reason to cut anywhere but between bytes.
        unit, name = (K_ALIGNMENT, "bytes") if group_size == -1 else (math.lcm(K_ALIGNMENT, group_size), "groups")
        if k != input_size and k % unit:
            fitting = [ranks for ranks in range(2, input_size // k) if input_size % (ranks * unit) == 0]
            instead = f"use {' or '.join(map(str, [1, *fitting]))} tensor-parallel ranks"
            if group_size != -1:
                instead += ", or calibrate with a smaller --group-size"
            raise UnsupportedError(
                f"{self._members[0]}: tensor parallelism gives a rank {k} of {input_size} inputs, which is not a whole number "
                f"of {name} of {unit}; {instead}"
            )


def _give_back_cached(device: torch.device) -> None:
    """What was freed in converting layers is kept by PyTorch, up to all memory of the GPU, which another process may need."""
    if device.type == "cuda" and torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > CACHED_BYTES:
        torch.cuda.empty_cache()
