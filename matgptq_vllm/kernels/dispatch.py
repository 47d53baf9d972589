"""Which kernel computes a product whose weights are in the kernel layout.

rows                                       kernel
up to 16; up to 32 of one width where      ``small.small_gemm``, where it runs (Hopper); else ``gemm.sliced_gemm``. These two
``small_config.prefers_small``             and ``wide.wide_gemm`` read the widths of the rows on the device
fewer than ``tuning.dense_from``           ``wide.wide_gemm``, where it runs (Hopper); else ``gemm.sliced_gemm``
more, of one width, as the host knows      ``dense.dense_linear``: weights of one width at a time, then cuBLAS
more, of several widths, or while a        up to ``WIDE_TO`` ``wide.wide_gemm``, where it runs: it is launched once, however
CUDA graph is captured                     many widths there are, and a replay may have rows of any
still more, and the host may decide        ``dense.dense_linear``, a width after the other
still more, while a graph is captured      both: ``dense.dense_linear`` computes all rows at the widest, which the device knows,
                                           then ``gemm.sliced_gemm`` the narrower ones
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels import arrange, cache_keys, dense, gemm, tuning
from matgptq_vllm.kernels.lanes_ptx import bits_needed
from matgptq_vllm.kernels.layout import num_planes
from matgptq_vllm.kernels.resident import KERNEL_DTYPES
from matgptq_vllm.kernels.segments import rows_of_width
from matgptq_vllm.kernels.small_config import prefers_small, small_config
from matgptq_vllm.kernels.tables import bucket
from matgptq_vllm.kernels.wide_config import WIDE_FROM, WIDE_TO, wide_config, wide_runs

cache_keys.derive([dense._expand_kernel, arrange._arrange_kernel, gemm._gemm_kernel])


@cache
def _for_hopper() -> tuple[ModuleType, ModuleType]:
    """Modules of the kernels that are written for Hopper: what they need, Triton may lack for other GPUs."""
    from matgptq_vllm.kernels import small, wide

    cache_keys.derive([small._small_kernel, wide._wide_kernel])
    return small, wide


def wide_linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    locks: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``sliced_linear`` by ``wide.wide_gemm``, for WIDE_FROM and more rows where it runs."""
    m, k = x.shape
    config = wide_config(bucket(m), n, k, tuning.hardware_of(x.device).num_sms, len(widths) == 1)
    if len(widths) == 1:
        arranged = arrange.as_it_is(x, config.block_m)
    else:
        arranged = arrange.arrange(x, token_profiles, profile_widths, widths, config.block_m, config.pdl)
    y: torch.Tensor = _for_hopper()[1].wide_gemm(
        arranged, x.new_empty(m, n), planes, scales, token_profiles, profile_widths, widths, group_size, rule, config, locks,
        bias,
    )  # fmt: skip
    return y


def sliced_linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    row_order: torch.Tensor,
    step_profiles: torch.Tensor,
    host_profile_widths: torch.Tensor,
    locks: torch.Tensor,
    widths: Sequence[int],
    group_size: int,
    rule: SliceRule,
    bias: torch.Tensor | None,
    host_decides: bool,
) -> torch.Tensor:
    """As ``ops.sliced_linear``, whose arguments these are; planes and scales in the kernel layout.

    Args:
        host_decides: whether this call's rows are all that it will ever compute, which is not so in a captured CUDA graph.
    """
    m, k = x.shape
    if m == 0:
        return x.new_empty(0, n)
    if x.is_cuda and x.dtype not in KERNEL_DTYPES:
        raise UnsupportedError(f"activations are {x.dtype}; the kernels multiply {' or '.join(map(str, KERNEL_DTYPES))}")
    # A plane that no profile reads may have no memory (engine.elastic): Triton takes no such argument.
    planes = planes[: num_planes(bits_needed(min(widths[-1], max(host_profile_widths.tolist())), rule))]
    many = m >= tuning.dense_from(n, k, x.device)
    if many and len(widths) == 1:
        return dense.dense_linear(x, planes, scales, n, k, [(widths[0], None)], group_size, rule, bias)
    # With one width nothing is looked up, and no order of rows is better than another.
    order = row_order if len(widths) > 1 else None
    on_hopper = wide_runs(x.device)
    prefers_wide = on_hopper and WIDE_FROM <= m <= (WIDE_TO if many else m)
    if many and host_decides:
        rows = rows_of_width(m, step_profiles, row_order, host_profile_widths)
        if rows is not None and (len(rows) == 1 or not prefers_wide):
            return dense.dense_linear(x, planes, scales, n, k, rows, group_size, rule, bias)
        # Fewer rows than the step has: its order would lead beyond them.
        order = None
    if on_hopper and prefers_small(m, n, k, widths, rule, tuning.hardware_of(x.device).num_sms):
        config = small_config(m, n, k, tuning.hardware_of(x.device).num_sms)
        y: torch.Tensor = _for_hopper()[0].small_gemm(
            x, planes, scales, n, token_profiles, profile_widths, widths, group_size, rule, config, locks, bias
        )  # fmt: skip
        return y
    if prefers_wide:
        return wide_linear(x, planes, scales, n, token_profiles, profile_widths, widths, group_size, rule, locks, bias)

    def fused(done: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        config = tuning.choose(m, n, k, widths, group_size, x.device, rule)
        return gemm.sliced_gemm(
            x, planes, scales, n, token_profiles, profile_widths, widths, group_size, rule, config, locks, order, bias, done
        )

    if not many:
        return fused()
    widest = profile_widths.index_select(0, token_profiles[:m]).amax()
    width = dense.WidthOnDevice(widest, tuple(widths))
    y = dense.dense_linear(x, planes, scales, n, k, [(width, None)], group_size, rule, bias)
    return fused((widest, y))
