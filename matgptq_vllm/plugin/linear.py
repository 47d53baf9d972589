"""MatGPTQLinearMethod: a vLLM linear layer whose weights are the leading planes of a parent.

Parameters of a layer on one tensor-parallel rank, with N outputs and K inputs of that rank:

    name      dtype            shape            sharded on
    plane{i}  uint8            [N, packed K]    N (column parallel, fused), K (row parallel)
    scales    the parent's     [N, groups]      N, and K unless there is one scale per channel
"""

from typing import Any

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
from matgptq_vllm.core.slicing import num_groups
from matgptq_vllm.engine.replica import Replica
from matgptq_vllm.kernels.ops import sliced_linear


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
        weight_loader = extra_weight_attrs.pop("weight_loader")

        for plane in range(self._replica.num_planes):
            data = torch.empty(n, reader.layout.packed_columns(plane, k), dtype=torch.uint8)
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

        profile_widths = self._replica.profile_widths(self._members)
        # Every uniform profile is there, so the widths do not depend on the profile table either.
        layer.widths = profile_widths.unique().tolist()
        layer.register_buffer("profile_widths", profile_widths.to(data.device), persistent=False)
        max_tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        token_profiles = self._replica.token_profiles(max_tokens, data.device)
        layer.register_buffer("token_profiles", token_profiles, persistent=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], every row at the width of its token's profile."""
        spec = self._replica.reader.spec
        planes = [getattr(layer, plane_name(plane)) for plane in range(self._replica.num_planes)]
        y = sliced_linear(
            x.reshape(-1, x.shape[-1]),
            planes,
            layer.scales,
            layer.token_profiles,
            layer.profile_widths,
            layer.widths,
            list(spec.plane_widths),
            spec.group_size,
            spec.slice_rule,
        ).reshape(*x.shape[:-1], -1)
        return y if bias is None else y + bias

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
        if k != input_size and (k % K_ALIGNMENT or (group_size != -1 and k % group_size)):
            raise UnsupportedError(
                f"{self._members[0]}: tensor parallelism gives a rank {k} of {input_size} inputs, which is not a whole number "
                f"of groups of {group_size}; use fewer ranks, or calibrate with a smaller --group-size"
            )
