"""Hidden states that wait on the host between blocks, and their way to the device and back while it computes."""

from collections.abc import Iterable, Iterator

import torch

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens per forward pass: enough to keep matrix products busy, little enough for the MLP's activations to be small."""


def batches_of(windows: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """``windows`` [num_windows, seq_len] in batches for ``device``; only the last may be smaller."""
    return list(windows.split(max(1, BATCH_TOKENS[device.type] // windows.shape[1])))


def hold(states: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``states`` that belongs to the caller, on the host, where copies to and from ``device`` are fast."""
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=device.type == "cuda").copy_(states)


def upload(held: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Tensors from the host on ``device``, each copied while the one before is in use.

    On the CPU they are the held tensors themselves, which the caller must not change.
    """
    if device.type == "cpu":
        yield from held
        return
    side = torch.cuda.Stream(device)

    def start(states: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        with torch.cuda.stream(side):
            copy = states.to(device, non_blocking=True)
            return copy, side.record_event()

    pending: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for states in held:
        following = start(states)
        if pending is not None:
            yield _arrived(*pending)
        pending = following
    if pending is not None:
        yield _arrived(*pending)


class Download:
    """Context manager that copies results into held tensors while the device goes on; leaving it waits for the last copy."""

    def __init__(self, device: torch.device):
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *_: object) -> None:
        if self._side is not None:
            self._side.synchronize()

    def copy(self, result: torch.Tensor, held: torch.Tensor) -> None:
        """Copy ``result`` into ``held``, of the same shape, on the host."""
        if self._side is None:
            held.copy_(result)
            return
        self._side.wait_stream(torch.cuda.current_stream(result.device))
        with torch.cuda.stream(self._side):
            held.copy_(result, non_blocking=True)
        result.record_stream(self._side)


def _arrived(copy: torch.Tensor, event: torch.cuda.Event) -> torch.Tensor:
    current = torch.cuda.current_stream(copy.device)
    current.wait_event(event)
    # The memory was taken on the side stream; it may be given out again only after the work queued here.
    copy.record_stream(current)
    return copy
