"""core.safetensors_header: a whole file passes, a cut one is refused naming the first tensor cut off."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.safetensors_header import read_header

TENSORS = {"b": torch.zeros(3, dtype=torch.float32), "a": torch.zeros((2, 5), dtype=torch.uint8), "empty": torch.zeros(0)}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_a_whole_file_passes(whole: Path) -> None:
    read_header(whole.parent, whole.name)


def test_every_shorter_file_is_refused(whole: Path) -> None:
    data = whole.read_bytes()
    data_start = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - data_start == 22
    for size in range(len(data)):
        whole.write_bytes(data[:size])
        # safetensors stores the widest types first: "b" in bytes 0..12, then "a".
        cut = "tensor 'b'" if size < data_start + 12 else "tensor 'a'"
        expected = "inside its header" if size < data_start else cut
        with pytest.raises(FormatError, match=rf"x\.safetensors: .*{expected}"):
            read_header(whole.parent, whole.name)


def test_a_header_larger_than_any_file_is_not_read(whole: Path) -> None:
    whole.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(FormatError, match="inside its header"):
        read_header(whole.parent, whole.name)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"x\.safetensors: cannot be read"):
        read_header(tmp_path, "x.safetensors")
