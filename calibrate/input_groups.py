"""Which layers of a block share an input, in which order they are called, and a look at those inputs while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

from calibrate.model import Block

Group: TypeAlias = tuple[str, ...]
"""Names of layers that are called with the same tensor (q/k/v, gate/up), in the order of their calls."""

Take: TypeAlias = Callable[[Group, torch.Tensor], None]
"""Given the inputs of a group, floating [..., K]."""


class AllSeen(Exception):
    """Ends a forward pass once every watched group was called."""


def trace_groups(block: Block, run: Callable[[], object]) -> list[Group]:
    """The groups of ``block`` in the order of their first calls.

    Layers that are not called come last, each a group of its own.

    Args:
        run: a forward pass of the block.
    """
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    hooks = [linear.register_forward_pre_hook(note(name)) for name, linear in block.linears.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    called = {name for _, names in seen for name in names}
    return [tuple(names) for _, names in seen] + [(name,) for name in block.linears if name not in called]


def steps_of(block: Block, groups: Sequence[Group]) -> list[list[Group]]:
    """``groups`` in steps: a step is rounded when all steps before it are. Groups of one parallel set make one step."""
    steps: list[list[Group]] = []
    step_of_set: dict[frozenset[str], list[Group]] = {}
    for group in groups:
        parallel = next((names for names in block.parallel if group[0] in names), None)
        step = step_of_set.get(parallel) if parallel is not None else None
        if step is None:
            step = []
            steps.append(step)
            if parallel is not None:
                step_of_set[parallel] = step
        step.append(group)
    return steps


@contextmanager
def watched(block: Block, groups: Sequence[Group], take: Take, stop: bool) -> Iterator[Callable[[], None]]:
    """Within it, ``take`` is given the inputs of each group as it is called.

    Args:
        stop: end the forward pass by ``AllSeen`` when the last group's inputs were taken.

    Yields:
        A function to call before each forward pass.
    """
    waiting: set[Group] = set()

    def watch(group: Group) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            take(group, args[0])
            waiting.discard(group)
            if stop and not waiting:
                raise AllSeen

        return hook

    hooks = [block.linears[group[0]].register_forward_pre_hook(watch(group)) for group in groups]
    try:
        yield lambda: waiting.update(groups)
    finally:
        for hook in hooks:
            hook.remove()
