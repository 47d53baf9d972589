"""Bytes of a parent's quantized layers on disk: per plane, and per profile that reads a prefix of the planes."""

from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.shapes import SCALE_BYTES, bits_read, leading_planes, num_groups, packed_columns
from matgptq_vllm.core.summary import ParentSummary


def plane_bytes(parent: ParentSummary) -> list[int]:
    """Bytes of each plane over all layers, most significant first."""
    return [sum(n * packed_columns(width, k) for n, k in parent.layers.values()) for width in parent.spec.plane_widths]


def scale_bytes(parent: ParentSummary) -> int:
    """Bytes of all scales."""
    return sum(_layer_scale_bytes(parent, name) for name in parent.layers)


def profile_bytes(parent: ParentSummary, profile: Profile) -> int:
    """Bytes of codes and scales that ``profile`` reads."""
    widths = parent.spec.plane_widths
    total = 0
    for name, (n, k) in parent.layers.items():
        planes = leading_planes(widths, bits_read(profile.widths[name], parent.spec.slice_rule))
        total += n * sum(packed_columns(width, k) for width in widths[:planes]) + _layer_scale_bytes(parent, name)
    return total


def _layer_scale_bytes(parent: ParentSummary, name: str) -> int:
    n, k = parent.layers[name]
    return n * num_groups(k, parent.spec.group_size) * SCALE_BYTES[parent.spec.scale_dtype]
