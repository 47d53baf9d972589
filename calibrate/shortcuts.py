"""Parts of a block that need not be computed again once their layers are rounded.

Where a child of a block (attention, MLP) returns what its last linear layer returns, it is that layer, applied to inputs that
do not change any more once the layers before it are rounded. Those inputs are seen when the last layer's statistics are
collected; kept, they spare later passes everything before it. On a GPU computing again is as fast as fetching them, so they
are kept on the CPU only, and only as long as they fit a budget.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibrate.model import Block
from calibrate.resident_block import Stream

BUDGET_BYTES = 2 << 30
"""Most memory that kept inputs take; batches beyond it are computed again."""


@dataclass(frozen=True)
class End:
    """The child of a block that returns the outputs of a layer."""

    child: nn.Module
    rest: tuple[Any, ...] | None
    """What it returns behind them, no tensors; None if it returns them alone."""


class Shortcuts:
    """The shortcuts of one block.

    Args:
        ends: last layer -> the child that it ends; those of ``noted_ends``.
        budget_bytes: most memory to take.
    """

    def __init__(self, block: Block, ends: Mapping[str, End], budget_bytes: int = BUDGET_BYTES):
        self._block = block
        self._ends = ends
        self._kept: dict[tuple[Stream, int], dict[str, torch.Tensor]] = {}
        self._bytes_left = budget_bytes

    def keep(self, stream: Stream, batch: int, name: str, inputs: torch.Tensor) -> None:
        """Keep the ``inputs`` [..., K] of the layer ``name`` in one batch, if it ends a child; nobody may change them."""
        if name in self._ends and inputs.nbytes <= self._bytes_left:
            self._kept.setdefault((stream, batch), {})[name] = inputs
            self._bytes_left -= inputs.nbytes

    @contextmanager
    def taken(self, stream: Stream, batch: int) -> Iterator[None]:
        """Within it, children whose last inputs are kept for this batch apply their last layer to them."""
        kept = dict(self._kept.get((stream, batch), {}))  # a pass may keep more
        for name, inputs in kept.items():
            end = self._ends[name]
            end.child.forward = _shortcut(end, self._block.linears[name], inputs)
        try:
            yield
        finally:
            for name in kept:
                del self._ends[name].child.forward


@contextmanager
def noted_ends(block: Block) -> Iterator[dict[str, End]]:
    """Yields what ``Shortcuts`` needs to know, filled by a forward pass within the context."""
    ends: dict[str, End] = {}
    # Outputs are held, so that no later one can take the place of one that is gone.
    outputs: list[tuple[str, torch.Tensor]] = []

    def note_layer(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append((name, output))

    def note_child(child: nn.Module, output: Any) -> None:
        first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if not any(isinstance(other, torch.Tensor) for other in rest or ()):
            ends.update({name: End(child, rest) for name, held in outputs if held is first})

    with ExitStack() as hooks:
        for name, linear in block.linears.items():
            handle = linear.register_forward_hook(lambda _, args, output, name=name: note_layer(name, output))
            hooks.callback(handle.remove)
        for child in block.module.children():
            handle = child.register_forward_hook(lambda child, args, output: note_child(child, output))
            hooks.callback(handle.remove)
        yield ends


def _shortcut(end: End, linear: nn.Linear, inputs: torch.Tensor) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = linear(inputs)
        return output if end.rest is None else (output, *end.rest)

    return forward
