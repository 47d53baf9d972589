"""Bytes of a parent's quantized layers: per plane, and per profile that reads a prefix of the planes."""

import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.slicing import num_groups


def plane_bytes(reader: ParentReader) -> list[int]:
    """Bytes of each plane over all layers, most significant first."""
    return [
        sum(n * reader.layout.packed_columns(plane, k) for n, k in reader.layers.values())
        for plane in range(len(reader.spec.plane_widths))
    ]


def scale_bytes(reader: ParentReader) -> int:
    """Bytes of all scales."""
    return sum(_layer_scale_bytes(reader, name) for name in reader.layers)


def profile_bytes(reader: ParentReader, profile: Profile) -> int:
    """Bytes of codes and scales that ``profile`` reads."""
    total = 0
    for name, (n, k) in reader.layers.items():
        planes = range(reader.num_planes(profile.widths[name]))
        total += n * sum(reader.layout.packed_columns(plane, k) for plane in planes) + _layer_scale_bytes(reader, name)
    return total


def _layer_scale_bytes(reader: ParentReader, name: str) -> int:
    n, k = reader.layers[name]
    return n * num_groups(k, reader.spec.group_size) * getattr(torch, reader.spec.scale_dtype).itemsize
