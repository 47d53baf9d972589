"""Microseconds per call on a GPU, from replays of CUDA graphs, all competitors taking turns.

A graph calls a competitor once per weight copy, in turn. The copies together are several times the L2 cache, so that every
call reads its weights from memory, as it does between the other layers of a model.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

BYTES_PER_CYCLE = 400_000_000
"""Weight bytes that all copies together should have; L2 caches hold up to 60 MB (H200) and 126 MB (B200)."""

MIN_COPIES, MAX_COPIES = 4, 64

MIN_REPLAY_US = 400.0
"""Lower bound of a replay's length: the start of a graph, some microseconds, must not count."""

ASSUMED_BYTES_PER_US = 4.5e6
ASSUMED_FLOPS_PER_US = 8e8
"""A fast GPU. On a slower one the replays are longer than they need be."""

WARM_UP_CALLS = 2
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the rounds."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int


@dataclass(frozen=True)
class Replay:
    """A captured graph."""

    run: Callable[[], None]
    """Enqueues one replay."""
    num_calls: int


def num_copies(bytes_read: int) -> int:
    """Weight copies to make of a layer of which one call reads ``bytes_read`` bytes."""
    return min(max(math.ceil(BYTES_PER_CYCLE / bytes_read), MIN_COPIES), MAX_COPIES)


def num_calls(copies: int, bytes_read: int, flops: float) -> int:
    """Calls per replay: the smallest multiple of ``copies`` that no GPU finishes in less than MIN_REPLAY_US."""
    floor_us = max(bytes_read / ASSUMED_BYTES_PER_US, flops / ASSUMED_FLOPS_PER_US)
    return copies * max(1, math.ceil(MIN_REPLAY_US / (copies * floor_us)))


def capture(
    calls: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, count: int, stream: torch.cuda.Stream
) -> Replay:
    """A graph of ``count`` calls on ``x``, the copies in turn, warmed up and recorded on the side stream ``stream``."""
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls[:WARM_UP_CALLS]:
            call(x)
        stream.synchronize()
        # torch.cuda.graph would also empty the allocator's cache each time. A collection of garbage during the capture
        # could free an older graph, which a capture forbids.
        gc.disable()
        try:
            graph.capture_begin()
            try:
                for index in range(count):
                    calls[index % len(calls)](x)
            finally:
                graph.capture_end()
        finally:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return Replay(graph.replay, count)


def time_round(replays: Mapping[str, Replay]) -> dict[str, float]:
    """Microseconds per call of every competitor, each replayed once, one after the other, without a pause."""
    events = {key: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for key in replays}
    # Not timed: while it runs, the host gets ahead, so that no timed replay waits for its launch.
    list(replays.values())[-1].run()
    for key, replay in replays.items():
        start, end = events[key]
        start.record()
        replay.run()
        end.record()
    torch.cuda.synchronize()
    return {key: 1e3 * start.elapsed_time(end) / replays[key].num_calls for key, (start, end) in events.items()}


def take_turns(
    one_round: Callable[[], Mapping[str, float]], rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, Timing]:
    """Timings of all competitors over up to ``rounds`` rounds.

    The first round warms up and is dropped. Its length decides how many of the others fit into ``seconds``, at least
    MIN_ROUNDS.

    Args:
        one_round: microseconds per call of every competitor.
        clock: seconds.
    """
    started = clock()
    one_round()
    length = clock() - started
    fitting = rounds if length <= 0 else int((seconds - length) / length)
    samples = [one_round() for _ in range(min(rounds, max(fitting, MIN_ROUNDS)))]
    return {key: summarize([sample[key] for sample in samples]) for key in samples[0]}


def summarize(samples_us: Sequence[float]) -> Timing:
    """Median, least and greatest of a competitor's samples."""
    return Timing(median(samples_us), min(samples_us), max(samples_us), len(samples_us))
