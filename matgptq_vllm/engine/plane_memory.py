"""Memory of one plane of all layers that can be given back to the machine and taken again, at addresses that never change.

CUDA graphs hold addresses of planes, so freeing a tensor and making it anew would break them. Here address space and memory
are separate: ``drop`` gives the memory back and keeps the addresses, ``restore`` puts memory, with any content, behind the same
addresses. On a GPU that is ``engine.cuda_memory``; on a CPU, pages that the kernel forgets.
"""

import mmap
from typing import Protocol

import torch


class PlaneMemory(Protocol):
    """Memory of one plane."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], any content, at an address good for any element type; only before the first ``drop``."""

    def drop(self) -> None:
        """Give the memory back. Until ``restore``, nothing may read or write the tensors."""

    def restore(self) -> None:
        """Take memory again; UnsupportedError if there is not enough, and then all is as before the call."""

    def filled(self) -> None:
        """Called when the restored memory has its content: what was needed to fill it can be given back."""


class HostMemory:
    """On a CPU: anonymous pages. Dropped ones read as 0, and take memory again when they are written."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        # Private: the pages of a shared mapping would survive MADV_DONTNEED.
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append(pages)
        return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)

    def drop(self) -> None:
        for pages in self._maps:
            pages.madvise(mmap.MADV_DONTNEED)

    def restore(self) -> None:
        """Nothing to do: a page comes back when it is written."""

    def filled(self) -> None:
        """Nothing to do: the C library gives large buffers back."""
