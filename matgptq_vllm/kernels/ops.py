"""The custom operator that the plugin calls. Opaque to torch.compile, so that no step's widths are baked into a graph."""

from typing import Any

import torch
from torch.library import Library

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import check_rule
from matgptq_vllm.kernels import cpu, reference

NAMESPACE = "matgptq"

_libraries: list[Library] = []  # An operator lives as long as its Library object.


def register_ops() -> None:
    """Define ``torch.ops.matgptq.sliced_linear``, which is ``sliced_linear``; calling this again changes nothing."""
    if _libraries:
        return
    library = Library(NAMESPACE, "FRAGMENT")
    # The kernels change locks and leave them as they were, so nothing is mutated.
    schema = torch.library.infer_schema(sliced_linear, mutates_args=())
    library.define("sliced_linear" + schema)
    library.impl("sliced_linear", sliced_linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::sliced_linear", _sliced_linear_fake, lib=library)
    _libraries.append(library)


def sliced_linear(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    n: int,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    row_order: torch.Tensor,
    step_profiles: torch.Tensor,
    host_profile_widths: torch.Tensor,
    locks: torch.Tensor,
    widths: list[int],
    plane_widths: list[int],
    group_size: int,
    rule: str,
    bias: torch.Tensor | None = None,
    graph_profile: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias with the weights of every row read at the width of that row's profile.

    The type of the planes tells their layout and with it who computes: uint8 is the checkpoint layout and plain torch,
    ``kernels.cpu`` on a CPU and ``kernels.reference`` elsewhere; int32 is the kernel layout and the kernels
    (``kernels.resident``).

    Args:
        x: floating [M, K].
        planes: leading planes, enough for the widest of ``widths``: each uint8 [N, packed K], or as in ``kernels.layout``.
        scales: floating [N, groups], or as in ``kernels.layout``.
        n: N.
        token_profiles: int32 [at least M]: profile index of each row. Like all buffers of the step it is written before the
            step, at an address that never changes.
        profile_widths: int32 [profiles]: this layer's width in each profile.
        row_order: int32 [at least M]: order of the rows, see ``kernels.segments``.
        step_profiles: int32 [profiles], on the CPU: rows of each profile, see ``kernels.segments``.
        host_profile_widths: ``profile_widths`` on the CPU.
        locks: int32, of ``kernels.resident``; not used with the checkpoint layout.
        widths: the distinct values of ``profile_widths``, ascending.
        plane_widths: bits per plane of the checkpoint layout, most significant first.
        bias: floating [N].
        graph_profile: int32 [1], on the CPU: index of the profile of all rows, now and whenever a CUDA graph that is being
            captured is replayed, so that the kernels of its one width are launched; negative, or None: rows may have any.

    Returns:
        [M, N], dtype of x.
    """
    m = x.shape[0]
    if m > token_profiles.shape[0]:
        raise ValueError(f"{m} rows, but profiles are known for {token_profiles.shape[0]}")
    slice_rule = check_rule(rule)
    only = -1 if graph_profile is None else int(graph_profile)
    if only >= 0:
        widths = [int(host_profile_widths[only])]
    if planes[0].dtype == torch.uint8:
        row_widths = profile_widths.index_select(0, token_profiles[:m])
        layout = PlaneLayout(tuple(plane_widths))
        if x.is_cpu:
            y = cpu.sliced_linear(x, planes, scales, row_widths, layout, group_size, slice_rule)
        else:
            y = reference.sliced_linear(x, planes, scales, row_widths, widths, layout, group_size, slice_rule)
        return y if bias is None else y + bias
    # Needs Triton, which a machine without a GPU may not have.
    from matgptq_vllm.kernels import dispatch

    host_decides = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    return dispatch.sliced_linear(
        x, planes, scales, n, token_profiles, profile_widths, row_order, step_profiles, host_profile_widths, locks, widths,
        group_size, slice_rule, bias, host_decides,
    )  # fmt: skip


def _sliced_linear_fake(x: torch.Tensor, planes: object, scales: object, n: int, *_: Any, **__: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)
