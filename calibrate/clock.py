"""Where the time of a run goes, and how much memory it took at most."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OTHER = "other"
"""Time in no named phase."""


class PhaseClock:
    """Seconds per phase. On a GPU they are the GPU's, measured without making the host wait.

    Args:
        device: the device whose work is timed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._phase = OTHER
        self._marks: list[tuple[str, torch.cuda.Event | float]] = [(OTHER, self._now())]
        self._seconds: dict[str, float] = {}
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it time counts for ``name``, and not for a phase around it."""
        outer, self._phase = self._phase, name
        self._marks.append((name, self._now()))
        try:
            yield
        finally:
            self._phase = outer
            self._marks.append((outer, self._now()))

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds so far; waits for the GPU."""
        self._marks.append((self._phase, self._now()))
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        for (name, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            self._seconds[name] = self._seconds.get(name, 0.0) + _between(start, stop)
        del self._marks[:-1]
        return dict(self._seconds)

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def peak_device_bytes(device: torch.device) -> int | None:
    """Most GPU memory that tensors took since the clock was made; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_host_bytes() -> int:
    """Most memory that this process took so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _between(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        assert isinstance(stop, float)
        return stop - start
    assert not isinstance(stop, float)
    return start.elapsed_time(stop) / 1000
