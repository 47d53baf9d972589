"""core.storage: bytes counted from shapes are those of the tensors on disk."""

from collections.abc import Callable
from pathlib import Path

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.storage import plane_bytes, profile_bytes, scale_bytes

from .conftest import ParentContent


def stored_bytes(reader: ParentReader, part: str) -> int:
    return sum(tensor.nbytes for name, tensor in reader.tensors() if name.endswith(f".{part}"))


def test_bytes_are_those_of_the_tensors_on_disk(parent: Path) -> None:
    reader = ParentReader(parent)
    assert plane_bytes(reader) == [stored_bytes(reader, f"plane{plane}") for plane in range(5)]
    assert scale_bytes(reader) == stored_bytes(reader, "scales")
    assert profile_bytes(reader, reader.profile("8")) == sum(plane_bytes(reader)) + scale_bytes(reader)


def test_a_narrow_slice_counts_the_planes_that_it_reads(
    parent: Path, new_content: Callable[..., ParentContent], tmp_path: Path
) -> None:
    nested = ParentReader(parent)
    assert profile_bytes(nested, nested.profile("2")) == plane_bytes(nested)[0] + scale_bytes(nested)
    rounding = ParentReader(new_content(rule="round").write(tmp_path / "rounding"))
    assert profile_bytes(rounding, rounding.profile("2")) == sum(plane_bytes(rounding)[:2]) + scale_bytes(rounding)
