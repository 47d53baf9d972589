"""Calibrate a model block by block. One block is in memory at a time; activations wait on the host.

For each block, in every stream: the inputs of the first layers that share one are seen and those layers rounded; then those
of the next layers, behind the rounded ones; and so on. The outputs of the rounded block are the inputs of the next.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from calibrate.activations import batches_of
from calibrate.clock import PhaseClock, peak_device_bytes, peak_host_bytes
from calibrate.few_tokens import top_up, warn_of_few_tokens
from calibrate.first_inputs import Call, capture_first_inputs
from calibrate.group_rounding import RoundedLayer, in_order, round_group
from calibrate.input_groups import steps_of
from calibrate.model import Block
from calibrate.ranks import Ranks
from calibrate.resident_block import ResidentBlock, check_finite
from calibrate.rounding import RoundingSettings, round_to_nearest
from calibrate.step_memory import steps_in_memory
from calibrate.streams import Streams
from calibrate.weights_source import WeightsSource


@dataclass(frozen=True)
class RoundedBlock:
    """One block, calibrated."""

    name: str
    layers: Sequence[RoundedLayer]
    """On the CPU, in the order of the block's modules."""
    seconds: float
    peak_bytes: int
    """Most memory taken up to its end: of the GPU if there is one, otherwise of the process."""


@dataclass(frozen=True)
class Calibration:
    """How blocks are calibrated."""

    settings: RoundingSettings
    streams: tuple[int, ...]
    """Narrow widths that have activations of their own."""
    dtype: torch.dtype
    """Type in which blocks compute and activations are kept."""
    ranks: Ranks
    clock: PhaseClock


Finished = Callable[[int], RoundedBlock | None]
"""Index of a block -> what an earlier run made of it, or None."""


@torch.no_grad()
def round_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    source: WeightsSource,
    windows: torch.Tensor,
    calibration: Calibration,
    finished: Finished,
) -> Iterator[RoundedBlock]:
    """Every block, calibrated, as soon as it is; those that are ``finished`` are only run.

    Args:
        model: a skeleton; its weights are those of ``source``.
        windows: calibration tokens, int64 [num_windows, seq_len]; each process takes its part of them.

    Raises:
        InputError: a layer has NaN or infinite weights or inputs.
        RankError: another process failed.
    """
    ranks, clock = calibration.ranks, calibration.clock
    with ranks.together():
        batches = batches_of(ranks.part_of(windows), ranks.device)
        first = capture_first_inputs(model, blocks, source, batches, calibration.dtype)
    with tqdm(desc="calibrating", unit="pass", disable=None if ranks.is_first else True) as progress:
        streams = Streams(first.hidden, calibration.streams, ranks, clock, progress.update)
        for index, (block, calls) in enumerate(zip(blocks, first.calls, strict=True)):
            progress.set_postfix_str(block.name)
            started, done, is_last = time.monotonic(), progress.n, index == len(blocks) - 1
            with ResidentBlock(block, ranks.device, calibration.dtype, calibration.streams) as resident:
                with ranks.together():
                    resident.load(source)
                rounded = finished(index)
                if rounded is None:
                    layers = _round_block(resident, streams, calls, calibration, is_last)
                    rounded = RoundedBlock(block.name, layers, time.monotonic() - started, _peak_bytes(ranks.device))
                    # Blocks are alike.
                    progress.total = progress.n + (progress.n - done) * (len(blocks) - index - 1)
                elif not is_last:
                    _replay_block(resident, rounded, streams, calls, calibration)
            yield rounded
            first.calls[index].clear()


def round_blocks_to_nearest(
    blocks: Sequence[Block], source: WeightsSource, settings: RoundingSettings, ranks: Ranks, finished: Finished
) -> Iterator[RoundedBlock]:
    """Every block, rounded to nearest at 8 bits: the baseline, without calibration text.

    Raises:
        InputError: a layer has NaN or infinite weights.
    """
    for index, block in enumerate(tqdm(blocks, desc="rounding", unit="block", disable=None if ranks.is_first else True)):
        started, rounded = time.monotonic(), finished(index)
        if rounded is None:
            layers = []
            for name in block.linears:
                weight = source.read(f"{name}.weight").to(ranks.device)
                check_finite(weight, name, "weights")
                codes, scales = round_to_nearest(weight, settings.slice_rule, settings.group_size, settings.scale_dtype)
                layers.append(RoundedLayer(name, codes.cpu(), scales.cpu(), {}, 0))
            rounded = RoundedBlock(block.name, layers, time.monotonic() - started, _peak_bytes(ranks.device))
        yield rounded


def _round_block(
    resident: ResidentBlock, streams: Streams, calls: Mapping[int, Call], calibration: Calibration, is_last: bool
) -> list[RoundedLayer]:
    """The layers of a block; unless it is the last, the streams hold its outputs afterwards."""
    ranks, widths = calibration.ranks, calibration.streams
    cross = bool(widths) and calibration.settings.asymmetry > 0
    with ranks.together():
        steps = steps_of(resident.block, streams.trace(resident, calls))
        steps = steps_in_memory(resident.block, steps, 1 + len(widths) * (2 if cross else 1))
    groups = [group for step in steps for group in step]
    # The original's inputs do not change while its block is rounded: one pass sees them all, unless each step needs them.
    original = {} if cross else streams.collect(resident, calls, groups, [None], advance=not is_last)
    layers: list[RoundedLayer] = []
    for step in steps:
        if cross:
            found = streams.collect(resident, calls, step, [None, *widths], cross=True)
        else:
            found = streams.collect(resident, calls, step, widths) if widths else {group: {} for group in step}
            for group in step:
                found[group][None] = original.pop(group)[None]
        top_up(resident.block, found)
        for group in step:
            weights = {name: resident.stored[name] for name in group}
            with calibration.clock.phase("rounding"):
                rounded = round_group(weights, found.pop(group), calibration.settings, ranks)
                _set_values(resident, rounded, calibration)
            layers += [layer.to(torch.device("cpu")) for layer in rounded]
    if not is_last:
        with ranks.together():
            streams.advance(resident, calls, [None, *widths] if cross else widths)
    if ranks.is_first:
        warn_of_few_tokens(resident.block, layers)
    return in_order(layers, list(resident.block.linears))


def _replay_block(
    resident: ResidentBlock, rounded: RoundedBlock, streams: Streams, calls: Mapping[int, Call], calibration: Calibration
) -> None:
    """Give the streams the outputs of a block that an earlier run has rounded."""
    with calibration.ranks.together():
        _set_values(resident, [layer.to(resident.device) for layer in rounded.layers], calibration)
        streams.advance(resident, calls, [None, *calibration.streams])


def _set_values(resident: ResidentBlock, layers: Sequence[RoundedLayer], calibration: Calibration) -> None:
    for layer in layers:
        for width in calibration.streams:
            resident.set_values(width, layer.name, layer.values(width, calibration.settings))


def _peak_bytes(device: torch.device) -> int:
    return peak_device_bytes(device) or peak_host_bytes()
