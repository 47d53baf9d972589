"""engine.plane_memory: memory returns to the machine, addresses stay."""

from pathlib import Path

import torch

from matgptq_vllm.engine.plane_memory import HostMemory

SIZE = 64 << 20


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_dropped_memory_returns_and_comes_back_at_the_same_address() -> None:
    memory = HostMemory()
    tensors = [memory.allocate(SIZE // 2).fill_(7) for _ in range(2)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    full = resident()
    memory.drop()
    assert full - resident() > 0.95 * SIZE
    memory.restore()
    tensors[0].fill_(9)
    assert int(tensors[0].min()) == 9
    assert int(tensors[1].max()) == 0
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert 0.95 * SIZE / 2 < full - resident() < 1.05 * SIZE / 2


def test_what_is_allocated_has_the_size_and_alignment_that_was_asked_for() -> None:
    tensor = HostMemory().allocate(6)
    assert (tensor.dtype, tensor.shape, tensor.data_ptr() % 512) == (torch.uint8, (6,), 0)
