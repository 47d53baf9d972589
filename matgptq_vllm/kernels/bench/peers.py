"""The competition: cuBLAS in bfloat16, and Marlin and Machete, called through vLLM's own functions.

Only this file imports vLLM, and only when a competitor of vLLM's is built. Weights are random GPTQ words, symmetric:

    tensor   dtype      shape                   meaning
    words    int32      [K * bits / 32, N]      bits b .. b + bits - 1 of word [i, n], b = bits * j: code of
                                                W[n, i * 32 / bits + j], a weight of (code - 2^(bits - 1)) * scale
    scales   bfloat16   [groups, N]
"""

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.slicing import expand_scales
from matgptq_vllm.kernels.bench.competitors import (
    Competitor,
    Problem,
    Workload,
    bytes_of_codes_and_scales,
    random_scales,
    reference_product,
)
from matgptq_vllm.kernels.bench.timing import num_copies

Call = Callable[[torch.Tensor], torch.Tensor]


def vllm_version() -> str:
    """Version of the vLLM that is measured; UnsupportedError if there is none."""
    # vLLM logs to stdout unless told otherwise, and stdout may carry our JSON.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm
    except ImportError as error:
        raise UnsupportedError(f"vLLM cannot be imported ({error})") from error
    return vllm.__version__


def build(competitor: Competitor, problem: Problem) -> Workload:
    """Copies of the layer for ``competitor``.

    Raises:
        UnsupportedError: this vLLM, or this kernel of it, cannot run the problem.
    """
    if competitor.family == "bf16":
        return _build_bf16(problem)
    vllm_version()
    bits = competitor.widths[0]
    make_call = (_marlin if competitor.family == "marlin" else _machete)(problem, bits)
    shape, device = problem.shape, problem.x.device
    bytes_read = bytes_of_codes_and_scales(shape, bits, problem.group_size)
    calls: list[Call] = []
    reference = None
    for _ in range(num_copies(bytes_read)):
        words = torch.randint(-(2**31), 2**31, (shape.k * bits // 32, shape.n), dtype=torch.int32, device=device)
        scales = random_scales(shape, problem.group_size, bits, device)
        if reference is None:
            rows_of_weights = partial(_weights, words, scales, bits, problem)
            reference = reference_product(problem.x, shape.n, rows_of_weights)
        calls.append(make_call(words, scales.T.contiguous()))
    assert reference is not None
    return Workload(calls, bytes_read, reference)


def codes_of_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [K * bits / 32, N] of packed words -> int32 [K, N] of codes, 0 .. 2^bits - 1."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    fields = (words[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
    return fields.reshape(-1, words.shape[1])


def _build_bf16(problem: Problem) -> Workload:
    shape = problem.shape
    bytes_read = 2 * shape.num_weights
    copies = [
        torch.randn(shape.n, shape.k, device=problem.x.device, dtype=torch.bfloat16).mul_(shape.k**-0.5)
        for _ in range(num_copies(bytes_read))
    ]
    reference = reference_product(problem.x, shape.n, lambda rows: copies[0][rows])
    return Workload([partial(linear, weight=weight) for weight in copies], bytes_read, reference)


def _weights(words: torch.Tensor, scales: torch.Tensor, bits: int, problem: Problem, rows: slice) -> torch.Tensor:
    """float32 [rows, K] of a layer's dequantized weights; ``scales`` bfloat16 [N, groups]."""
    levels = codes_of_words(words[:, rows], bits).T - (1 << (bits - 1))
    return levels.float() * expand_scales(scales[rows].float(), problem.shape.k, problem.group_size)


def _marlin(problem: Problem, bits: int) -> Callable[[torch.Tensor, torch.Tensor], Call]:
    """From words and scales to a call of Marlin, the way vLLM's own linear layers make and call it."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as marlin
    from vllm.scalar_type import scalar_types

    shape, device, group_size = problem.shape, problem.x.device, problem.group_size
    weight_type = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    marlin.verify_marlin_supported(weight_type, group_size)
    marlin.verify_marlin_supports_shape(shape.n, shape.k, shape.k, group_size)
    # One workspace for all copies, because they run one after the other on one stream; the kernel leaves it zeroed.
    workspace = marlin.marlin_make_workspace_new(device)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    repack = _accepting(ops.gptq_marlin_repack, {"perm": empty, "size_k": shape.k, "size_n": shape.n, "num_bits": bits})
    apply = _accepting(
        marlin.apply_gptq_marlin_linear,
        {
            "weight_zp": empty,
            "g_idx": empty,
            "g_idx_sort_indices": empty,
            "workspace": workspace,
            "wtype": weight_type,
            "output_size_per_partition": shape.n,
            "input_size_per_partition": shape.k,
            "is_k_full": True,
        },
    )

    def make_call(words: torch.Tensor, scales: torch.Tensor) -> Call:
        permuted = marlin.marlin_permute_scales(scales, shape.k, shape.n, group_size)
        return partial(apply, weight=repack(b_q_weight=words), weight_scale=permuted)

    return make_call


def _machete(problem: Problem, bits: int) -> Callable[[torch.Tensor, torch.Tensor], Call]:
    """From words and scales to a call of Machete with its own choice of schedule."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import machete_utils as machete
    from vllm.scalar_type import scalar_types

    shape, group_size, dtype = problem.shape, problem.group_size, problem.x.dtype
    weight_type = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    if torch.cuda.get_device_capability(problem.x.device)[0] != 9:
        raise UnsupportedError("Machete runs on compute capability 9.0 only")
    if weight_type not in machete.query_machete_supported_quant_types(False):
        raise UnsupportedError(f"Machete does not support {weight_type}")
    if group_size not in machete.query_machete_supported_group_sizes(dtype):
        allowed = machete.query_machete_supported_group_sizes(dtype)
        raise UnsupportedError(f"Machete does not support group size {group_size}, only {allowed}")
    fits, reason = machete.check_machete_supports_shape(shape.k, shape.n)
    if not fits:
        raise UnsupportedError(f"Machete does not support the shape: {reason}")

    def make_call(words: torch.Tensor, scales: torch.Tensor) -> Call:
        # Machete takes its words column-major.
        column_major = words.T.contiguous().T
        packed = ops.machete_prepack_B(column_major, a_type=dtype, b_type=weight_type, group_scales_type=dtype)
        return partial(ops.machete_mm, b_q=packed, b_type=weight_type, b_group_scales=scales, b_group_size=group_size)

    return make_call


def _accepting(function: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """``function`` with those of ``arguments`` that it has: 0.26 asks for tensors of activation reordering, 0.32 does not."""
    return partial(
        function, **{name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}
    )
