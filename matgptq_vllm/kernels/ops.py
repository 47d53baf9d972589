"""The custom operator that the plugin calls. Opaque to torch.compile, so that no step's widths are baked into a graph."""

import torch
from torch.library import Library

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import check_rule
from matgptq_vllm.kernels import reference

NAMESPACE = "matgptq"

_libraries: list[Library] = []  # An operator lives as long as its Library object.


def register_ops() -> None:
    """Define ``torch.ops.matgptq.sliced_linear``; calling it again changes nothing."""
    if _libraries:
        return
    library = Library(NAMESPACE, "FRAGMENT")
    schema = torch.library.infer_schema(_sliced_linear, mutates_args=())
    library.define("sliced_linear" + schema)
    library.impl("sliced_linear", _sliced_linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::sliced_linear", _sliced_linear_fake, lib=library)
    _libraries.append(library)


def sliced_linear(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: list[int],
    plane_widths: list[int],
    group_size: int,
    rule: str,
) -> torch.Tensor:
    """x @ W.T with the weights of every row read at the width of that row's profile. Needs ``register_ops``.

    Args:
        x: floating [M, K].
        planes: leading planes, each uint8 [N, packed K].
        scales: floating [N, groups].
        token_profiles: int32 [at least M]: profile index of each row; a persistent buffer, read on the device.
        profile_widths: int32 [number of profiles]: this layer's width in each profile.
        widths: the distinct values of ``profile_widths``.
        plane_widths: bits per plane of the parent, most significant first.

    Returns:
        [M, N], dtype of x.
    """
    return torch.ops.matgptq.sliced_linear(
        x, planes, scales, token_profiles, profile_widths, widths, plane_widths, group_size, rule
    )


def _sliced_linear(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: list[int],
    plane_widths: list[int],
    group_size: int,
    rule: str,
) -> torch.Tensor:
    row_widths = profile_widths[token_profiles[: x.shape[0]].long()]
    layout = PlaneLayout(tuple(plane_widths))
    return reference.sliced_linear(x, planes, scales, row_widths, widths, layout, group_size, check_rule(rule))


def _sliced_linear_fake(
    x: torch.Tensor,
    planes: list[torch.Tensor],
    scales: torch.Tensor,
    token_profiles: torch.Tensor,
    profile_widths: torch.Tensor,
    widths: list[int],
    plane_widths: list[int],
    group_size: int,
    rule: str,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])
