"""How a layer's weights stay in memory: in the kernel layout where the Triton kernels run, elsewhere as they were loaded."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.kernels.capability import check_capability
from matgptq_vllm.kernels.layout import plane_shapes, scales_shape, to_kernel_layout
from matgptq_vllm.kernels.layout import write_kernel_planes as write_kernel_planes

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Activations that the kernels multiply."""


class Resident(NamedTuple):
    """What a layer holds for the kernels; arguments of ``ops.sliced_linear``."""

    planes: list[torch.Tensor]
    """int32, see ``kernels.layout``."""
    scales: torch.Tensor
    """bfloat16 or float32, see ``kernels.layout``."""
    locks: torch.Tensor
    """int32, all 0 between products."""


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` on ``device`` are for the kernels; if not, weights stay in the checkpoint layout.

    So float32 on a GPU is plain torch: right, but not fast.

    Raises:
        UnsupportedError: the GPU is too old.
    """
    if device.type != "cuda":
        return False
    check_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), "matgptq-vllm needs")
    return dtype in KERNEL_DTYPES


def to_resident(planes: Sequence[torch.Tensor], scales: torch.Tensor, layout: PlaneLayout, k: int, group_size: int) -> Resident:
    """A layer for the kernels, from the checkpoint layout. Arguments as those of ``layout.to_kernel_layout``."""
    # Where no kernel runs, there may be no Triton to import.
    from matgptq_vllm.kernels.gemm import num_locks

    n = planes[0].shape[0]
    kernel_planes, kernel_scales = to_kernel_layout(planes, scales, layout, k, group_size)
    return Resident(kernel_planes, kernel_scales, torch.zeros(num_locks(n), dtype=torch.int32, device=scales.device))


def resident_zeros(n: int, k: int, count: int, scale_dtype: torch.dtype, group_size: int, device: torch.device) -> Resident:
    """A layer of zeros with ``count`` planes, to compile kernels with."""
    from matgptq_vllm.kernels.gemm import num_locks

    planes = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in plane_shapes(n, k)[:count]]
    scales = torch.zeros(scales_shape(n, k, group_size), dtype=scale_dtype, device=device)
    return Resident(planes, scales, torch.zeros(num_locks(n), dtype=torch.int32, device=device))
