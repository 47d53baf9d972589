"""engine.cuda_memory: on a GPU, memory that goes and comes back behind a captured graph; elsewhere, the calls of the driver."""

import ctypes
from contextlib import nullcontext

import pytest
import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.engine import cuda_memory
from matgptq_vllm.engine.cuda_memory import CudaMemory

MIB = 1 << 20
BASE = 1 << 40


class Driver:
    """Keeps books as the CUDA driver does; ``free`` is the memory that it has."""

    def __init__(self) -> None:
        self.free = 64 * MIB
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.next_handle = 1

    def cuMemGetAllocationGranularity(self, out, properties, option) -> int:
        assert (properties._obj.type, properties._obj.location.type, properties._obj.location.id) == (1, 1, 3)
        out._obj.value = 2 * MIB
        return 0

    def cuMemAddressReserve(self, out, size, alignment, address, flags) -> int:
        assert size.value % (2 * MIB) == 0
        out._obj.value = BASE
        return 0

    def cuMemCreate(self, out, size, properties, flags) -> int:
        if size.value > self.free:
            return 2
        self.free -= size.value
        self.handles[self.next_handle] = size.value
        out._obj.value, self.next_handle = self.next_handle, self.next_handle + 1
        return 0

    def cuMemMap(self, address, size, offset, handle, flags) -> int:
        assert self.handles[handle.value] == size.value
        assert address.value not in self.mapped
        self.mapped[address.value] = size.value
        return 0

    def cuMemSetAccess(self, address, size, description, count) -> int:
        assert (self.mapped[address.value], description._obj.flags, count.value) == (size.value, 3, 1)
        return 0

    def cuMemRelease(self, handle) -> int:
        del self.handles[handle.value]
        return 0

    def cuMemUnmap(self, address, size) -> int:
        assert self.mapped.pop(address.value) == size.value
        self.free += size.value
        return 0

    def cuGetErrorString(self, status, out) -> int:
        out._obj.value = b"out of memory"
        return 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(cuda_memory, "_driver", lambda: driver)
    monkeypatch.setattr(torch, "as_tensor", lambda given, device: given.__cuda_array_interface__["data"][0])
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return driver


def test_the_structures_have_the_sizes_of_the_driver_api() -> None:
    sizes = [ctypes.sizeof(kind) for kind in (cuda_memory._AllocationProperties, cuda_memory._AccessDescription)]
    assert sizes == [32, 12]


def test_memory_is_taken_as_it_is_needed_and_given_back_whole(driver: Driver) -> None:
    memory = CudaMemory(torch.device("cuda", 3), 10 * MIB)
    addresses = [memory.allocate(nbytes) for nbytes in (MIB, 3, 5 * MIB, 512)]
    assert addresses == [BASE, BASE + MIB, BASE + MIB + 512, BASE + 6 * MIB + 512]
    assert sum(driver.mapped.values()) == 64 * MIB - driver.free == 8 * MIB
    assert driver.handles == {}
    before = dict(driver.mapped)
    memory.drop()
    assert (driver.mapped, driver.free) == ({}, 64 * MIB)
    memory.restore()
    assert driver.mapped == before


def test_where_memory_is_short_nothing_is_taken(driver: Driver) -> None:
    memory = CudaMemory(torch.device("cuda", 3), 10 * MIB)
    memory.allocate(4 * MIB)
    memory.allocate(4 * MIB)
    memory.drop()
    driver.free = 6 * MIB
    with pytest.raises(UnsupportedError, match="cuMemCreate failed: out of memory"):
        memory.restore()
    assert (driver.mapped, driver.free) == ({}, 6 * MIB)


@pytest.fixture
def on_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.zeros(1, device="cuda")
    return torch.device("cuda", torch.cuda.current_device())


def test_a_captured_graph_reads_what_came_back(on_gpu: torch.device) -> None:
    size = 256 * MIB
    memory = CudaMemory(on_gpu, size)
    held = memory.allocate(size)
    held.fill_(3)
    total = torch.zeros((), dtype=torch.int64, device=on_gpu)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.sum(held, 0, dtype=torch.int64, out=total)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.sum(held, 0, dtype=torch.int64, out=total)
    graph.replay()
    assert int(total) == 3 * size
    torch.cuda.synchronize()
    full = torch.cuda.mem_get_info()[0]
    memory.drop()
    assert torch.cuda.mem_get_info()[0] - full >= size
    memory.restore()
    assert abs(torch.cuda.mem_get_info()[0] - full) <= 32 * MIB
    held.fill_(5)
    graph.replay()
    assert int(total) == 5 * size
