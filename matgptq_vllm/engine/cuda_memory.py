"""CudaMemory: GPU memory behind reserved addresses, by the virtual memory management of the CUDA driver API.

Reference: CUDA Driver API, section "Virtual Memory Management" (cuMemAddressReserve, cuMemCreate, cuMemMap, cuMemSetAccess,
cuMemUnmap). PyTorch's own allocator cannot do this; vLLM's for sleep mode can only let all of its memory go at once.
"""

import ctypes
from functools import cache
from typing import Any

import torch

from matgptq_vllm.core.errors import UnsupportedError

ALIGNMENT = 512
"""Bytes: that of PyTorch's allocator, enough for every access of the kernels."""

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class _Range:
    """Bytes on a GPU, as ``torch.as_tensor`` takes them."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


class CudaMemory:
    """See ``engine.plane_memory``.

    Args:
        device: a CUDA device; its context must exist.
        capacity: bytes that ``allocate`` is asked for together, at most. Only addresses are taken for them.

    Raises:
        UnsupportedError (from all methods): the driver refuses, for instance because the GPU's memory is full.
    """

    def __init__(self, device: torch.device, capacity: int):
        self._device = device
        index = torch.cuda.current_device() if device.index is None else device.index
        location = _Location(_ON_DEVICE, index)
        self._properties = _AllocationProperties(_PINNED, 0, location, None)
        self._access = _AccessDescription(location, _READ_WRITE)
        granularity = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), _MINIMUM)
        self._granularity = granularity.value
        # Room for every allocation to begin at its alignment.
        self._reserved = self._rounded(2 * capacity + self._granularity)
        base = ctypes.c_uint64()
        _call("cuMemAddressReserve", ctypes.byref(base), _size(self._reserved), _size(0), _address(0), ctypes.c_uint64(0))
        self._base = base.value
        self._used = 0
        self._extents: list[tuple[int, int]] = []
        """(address, bytes) of what was mapped by one call each: what is mapped together must be unmapped together."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        mapped = sum(size for _, size in self._extents)
        if start + nbytes > self._reserved:
            raise UnsupportedError(f"a plane needs {start + nbytes} bytes, addresses were reserved for {self._reserved}")
        if start + nbytes > mapped:
            extent = (self._base + mapped, self._rounded(start + nbytes - mapped))
            self._map(extent)
            self._extents.append(extent)
        self._used = start + nbytes
        return torch.as_tensor(_Range(self._base + start, nbytes), device=self._device)

    def drop(self) -> None:
        # Kernels that read it may still run.
        torch.cuda.synchronize(self._device)
        for address, size in self._extents:
            _call("cuMemUnmap", _address(address), _size(size))

    def restore(self) -> None:
        self._return_freed()
        for index, extent in enumerate(self._extents):
            try:
                self._map(extent)
            except UnsupportedError:
                for address, size in self._extents[:index]:
                    _call("cuMemUnmap", _address(address), _size(size))
                raise

    def filled(self) -> None:
        self._return_freed()

    def _return_freed(self) -> None:
        """Freed blocks that PyTorch keeps are memory that the driver does not have."""
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()

    def _map(self, extent: tuple[int, int]) -> None:
        address, size = extent
        handle = ctypes.c_uint64()
        _call("cuMemCreate", ctypes.byref(handle), _size(size), ctypes.byref(self._properties), ctypes.c_uint64(0))
        try:
            _call("cuMemMap", _address(address), _size(size), _size(0), handle, ctypes.c_uint64(0))
        finally:
            # The mapping keeps the memory; without this handle, unmapping it frees it.
            _call("cuMemRelease", handle)
        try:
            _call("cuMemSetAccess", _address(address), _size(size), ctypes.byref(self._access), _size(1))
        except UnsupportedError:
            _call("cuMemUnmap", _address(address), _size(size))
            raise

    def _rounded(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the CUDA driver library cannot be loaded ({error})") from None


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise UnsupportedError(f"{name} failed: {(text.value or b'unknown error').decode()} ({status})")


def _size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def _address(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)
