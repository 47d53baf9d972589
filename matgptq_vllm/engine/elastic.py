"""ElasticPlanes: the planes of a worker that can be dropped and read again while it runs.

Narrowing: first no row can meet a width that needs the planes (``SlicedLayer.limit``), then their memory goes. Widening: the
memory comes back and is filled by threads, beside the engine's steps, which do not read it; only then may rows be that wide.
Whoever calls sees to it that no request needs a dropped width: here is only what keeps a mistake from reading lost memory.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from matgptq_vllm.core.errors import InputError, MatGPTQError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.read_ahead import in_order
from matgptq_vllm.core.shapes import bits_read, leading_planes
from matgptq_vllm.engine.plane_memory import PlaneMemory

_logger = logging.getLogger(__name__)


class SlicedLayer(Protocol):
    """A layer of the engine."""

    def limit(self, max_width: int) -> None:
        """From the next step on, read no row wider than ``max_width``."""

    def load(self, planes: range) -> None:
        """Read these planes from the parent into their memory. Threads may call this."""


class ElasticPlanes:
    """One worker's.

    Args:
        plane_widths: bits of the planes as they are held.
        slice_rule: of the parent.
        max_width: what the replica was started with, and its upper bound.
        new_memory: makes the memory of a plane, given its index.
    """

    def __init__(self, plane_widths: Sequence[int], slice_rule: str, max_width: int, new_memory: Callable[[int], PlaneMemory]):
        self.available = max_width
        self.max_width = max_width
        """Up to where planes are held now."""
        self.failure: str | None = None
        """Why the last widening failed; None if it did not."""
        self._plane_widths, self._slice_rule = tuple(plane_widths), slice_rule
        first = self.num_planes(WIDTHS[0])
        self._memories = {plane: new_memory(plane) for plane in range(first, self.num_planes(max_width))}
        self._layers: list[SlicedLayer] = []
        self._growing: tuple[int, Future[None]] | None = None

    def num_planes(self, max_width: int) -> int:
        """Leading planes that ``max_width`` needs."""
        return leading_planes(self._plane_widths, bits_read(max_width, self._slice_rule))

    def new_tensor(self, plane: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for a layer's part of a plane; None for a plane that every width needs, which is never dropped."""
        memory = self._memories.get(plane)
        if memory is None:
            return None
        numel = torch.Size(shape).numel()
        return memory.allocate(numel * dtype.itemsize).view(dtype).view(torch.Size(shape))

    def add(self, layer: SlicedLayer) -> None:
        """A layer whose planes are here."""
        self._layers.append(layer)

    @property
    def growing(self) -> bool:
        """Whether a widening is under way."""
        return self._growing is not None

    def shrink(self, max_width: int) -> None:
        """Drop the planes that ``max_width`` does not need; InputError unless it is narrower than what is held."""
        self._check(max_width, max_width < self.max_width)
        for layer in self._layers:
            layer.limit(max_width)
        self._drop(range(self.num_planes(max_width), self.num_planes(self.max_width)))
        self.max_width = max_width

    def grow(self, max_width: int) -> None:
        """Begin to read the planes for ``max_width``; InputError unless it is wider than what is held, and available."""
        self._check(max_width, self.max_width < max_width <= self.available)
        self.failure = None
        pool = ThreadPoolExecutor(1, thread_name_prefix="grow")
        self._growing = max_width, pool.submit(self._read, range(self.num_planes(self.max_width), self.num_planes(max_width)))
        pool.shutdown(wait=False)

    def finish(self) -> None:
        """If a widening has come to its end, make it hold; to be called between two steps."""
        if self._growing is None or not self._growing[1].done():
            return
        (max_width, future), self._growing = self._growing, None
        error = future.exception()
        if error is not None:
            self.failure = str(error) if isinstance(error, MatGPTQError) else f"{type(error).__name__}: {error}"
            _logger.error("Planes up to width %d could not be read again: %s", max_width, self.failure)
            return
        for layer in self._layers:
            layer.limit(max_width)
        self.max_width = max_width

    def _check(self, max_width: int, possible: bool) -> None:
        if self._growing is not None:
            raise InputError(f"planes up to width {self._growing[0]} are being read; wait until they are")
        if max_width not in WIDTHS or not possible:
            raise InputError(f"max width {max_width} is not possible now: {self.max_width} is held, {self.available} available")

    def _read(self, planes: range) -> None:
        restored = []
        try:
            for plane in planes:
                self._memories[plane].restore()
                restored.append(plane)
            for _ in in_order(lambda layer: layer.load(planes), self._layers):
                pass
            for plane in planes:
                self._memories[plane].filled()
        except BaseException:
            self._drop(restored)
            raise

    def _drop(self, planes: Sequence[int]) -> None:
        for plane in planes:
            self._memories[plane].drop()
