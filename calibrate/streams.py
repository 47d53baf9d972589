"""The activations of every stream, which walk through the model block by block, and what rounding learns on the way.

A stream is a model: the original, or the one whose finished blocks hold the values at one narrow width. Widths without a
stream of their own use the original's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from calibrate.activations import Download, hold, upload
from calibrate.clock import PhaseClock
from calibrate.first_inputs import Call, to_device
from calibrate.input_groups import AllSeen, Group, trace_groups, watched
from calibrate.matching_inputs import OriginalInputs
from calibrate.ranks import Ranks
from calibrate.resident_block import ResidentBlock, Stream, check_finite
from calibrate.shortcuts import Shortcuts, noted_ends
from calibrate.statistics import InputStatistics, StatisticsAccumulator

Statistics = Mapping[Stream, InputStatistics]
"""Stream -> the inputs of one group in it."""


class Streams:
    """Inputs of the next block in every stream.

    Args:
        hidden: inputs of the first block, the same in all streams: floating [batch, seq_len, hidden], one per batch; the list
            is emptied, so that they are in memory once more at most batch by batch.
        widths: the streams besides the original.
        progress: told how many forward passes were made.
    """

    def __init__(
        self,
        hidden: list[torch.Tensor],
        widths: Sequence[int],
        ranks: Ranks,
        clock: PhaseClock,
        progress: Callable[[int], None],
    ):
        self._device = ranks.device
        self._ranks = ranks
        self._clock = clock
        self._progress = progress
        self.widths = tuple(widths)
        self._hidden: dict[Stream, list[torch.Tensor]] = {stream: [] for stream in (None, *widths)}
        self._num_batches = len(hidden)
        self._shortcuts: Shortcuts | None = None
        while hidden:
            states = hidden.pop(0)
            for held in self._hidden.values():
                held.append(hold(states, self._device))

    def trace(self, resident: ResidentBlock, calls: Mapping[int, Call]) -> list[Group]:
        """The groups of a block, by a forward pass of the first batch."""
        states = self._hidden[None][0].to(self._device)
        call = to_device(calls[len(states)], self._device)
        with self._clock.phase("forward"), noted_ends(resident.block) as ends:
            groups = trace_groups(resident.block, lambda: resident.run(None, states, call))
        self._shortcuts = Shortcuts(resident.block, ends) if self._device.type == "cpu" else None
        return groups

    def advance(self, resident: ResidentBlock, calls: Mapping[int, Call], streams: Sequence[Stream]) -> None:
        """Replace the inputs of the block by its outputs, in ``streams``."""
        with self._clock.phase("forward"), Download(self._device) as download:
            for batch, held, stream, states, call in self._batches(calls, streams):
                with self._shortcut(stream, batch):
                    download.copy(resident.run(stream, states, call), held)
                self._progress(1)
        self._shortcuts = None

    def collect(
        self,
        resident: ResidentBlock,
        calls: Mapping[int, Call],
        groups: Sequence[Group],
        streams: Sequence[Stream],
        cross: bool = False,
        advance: bool = False,
    ) -> dict[Group, dict[Stream, InputStatistics]]:
        """Statistics of the inputs of ``groups``, the layers before them being as ``resident`` holds them.

        Args:
            streams: the streams to look at; with ``cross`` the original must be the first.
            cross: sum also the products with the original's inputs.
            advance: replace the inputs of the block by its outputs on the way.

        Raises:
            InputError: inputs that are NaN or infinite.
        """
        k_of = {group: resident.block.linears[group[0]].in_features for group in groups}
        sums = {
            stream: {group: StatisticsAccumulator(k, self._device, cross and stream is not None) for group, k in k_of.items()}
            for stream in streams
        }
        current: tuple[Stream, int] = None, 0
        originals = OriginalInputs()

        def take(group: Group, inputs: torch.Tensor) -> None:
            expert = resident.block.experts.get(group[0])
            stream, batch = current
            if cross and stream is None:
                originals.keep(group, inputs, expert)
            with self._clock.phase("hessian"):
                sums[stream][group].add(inputs, originals.matching(group, inputs, expert) if cross else None)
            if self._shortcuts is not None and not advance:
                self._shortcuts.keep(stream, batch, group[0], inputs)

        with (
            self._ranks.together(),
            self._clock.phase("forward"),
            Download(self._device) as download,
            watched(resident.block, groups, take, stop=not advance) as begin,
        ):
            for batch, held, stream, states, call in self._batches(calls, streams):
                current = stream, batch
                begin()
                try:
                    with self._shortcut(stream, batch):
                        output = resident.run(stream, states, call)
                except AllSeen:
                    pass
                else:
                    if advance:
                        download.copy(output, held)
                self._progress(1)
        found: dict[Group, dict[Stream, InputStatistics]] = {}
        with self._clock.phase("hessian"):
            for group in groups:
                found[group] = {stream: sums[stream].pop(group).finish(self._ranks) for stream in streams}
                for statistics in found[group].values():
                    check_finite(statistics.hessian, group[0], "inputs")
        return found

    def _batches(
        self, calls: Mapping[int, Call], streams: Sequence[Stream]
    ) -> Iterator[tuple[int, torch.Tensor, Stream, torch.Tensor, Call]]:
        """Number of the batch, held inputs, stream, inputs on the device and arguments, batch by batch and stream by stream."""
        on_device = {size: to_device(call, self._device) for size, call in calls.items()}
        order = [(index, stream) for index in range(self._num_batches) for stream in streams]
        held = [self._hidden[stream][index] for index, stream in order]
        for (index, stream), own, states in zip(order, held, upload(held, self._device), strict=True):
            yield index, own, stream, states, on_device[len(states)]

    def _shortcut(self, stream: Stream, batch: int) -> AbstractContextManager[None]:
        return nullcontext() if self._shortcuts is None else self._shortcuts.taken(stream, batch)
