"""Calibrate a model block by block: the outputs of a rounded block are the inputs of the next.

For each block: one forward pass collects a Hessian for every distinct input of its linear layers; layers that share an
input are rounded together; a second pass with the rounded weights computes the inputs of the next block.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from calibrate.hessian import HessianAccumulator
from calibrate.model import Block, capture_inputs, find_blocks, replay, to_device
from calibrate.objective import JointObjective
from calibrate.options import CalibrateOptions
from calibrate.rounding import RoundingSettings, round_layer, round_to_nearest
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import check_rule, dequantize

BATCH_TOKENS = 4096
"""Tokens per forward pass: enough to keep matrix products busy, little enough for long windows to fit."""


@dataclass(frozen=True)
class RoundedLayer:
    """One linear layer, calibrated."""

    name: str
    codes: torch.Tensor
    """uint8 [N, K], on the CPU."""
    scales: torch.Tensor
    """The spec's scale type, [N, num_groups], on the CPU."""
    errors: dict[int, float]
    """Width -> squared error of the layer's outputs, relative to its squared outputs; empty without calibration text."""


def round_blocks(
    model: PreTrainedModel, windows: torch.Tensor, options: CalibrateOptions, spec: ParentSpec, device: torch.device
) -> Iterator[RoundedLayer]:
    """Every linear layer of ``model``'s blocks, calibrated, as soon as it is.

    Weights of ``model`` are overwritten on the way, its other parameters are not.

    Args:
        windows: calibration tokens, int64 [num_windows, seq_len].
        device: where to compute; blocks visit it one at a time.

    Raises:
        InputError: a layer has NaN or infinite weights or inputs.
    """
    blocks = find_blocks(model)
    stored_dtype = model.dtype
    stages = [
        # Scales, and the codes that all widths share, are for all widths; later bits are for the widths that read them.
        JointObjective(spec.slice_rule, options.widths if stage == 0 else widths, widths, device)
        for stage, widths in enumerate(options.compensate)
    ]
    settings = RoundingSettings(spec.group_size, getattr(torch, spec.scale_dtype), options.damp, options.act_order)
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    inputs = capture_inputs(model, blocks, batches)
    hidden = inputs.hidden
    steps = sum(2 * len(batches) + len(block.linears) for block in blocks) - len(batches)
    with tqdm(total=steps, desc="calibrating", unit="step", disable=None) as progress:
        for block, calls in zip(blocks, inputs.calls, strict=True):
            progress.set_postfix_str(block.name)
            block.module.to(device=device, dtype=torch.float32)
            for names, hessian in _collect(block, hidden, calls, device, progress):
                yield from _round_shared(block, names, hessian, stages, settings, spec, options.propagate)
                progress.update(len(names))
            # Nobody reads the outputs of the last block.
            for index, call in enumerate(calls if block is not blocks[-1] else []):
                output = replay(block, hidden[index].to(device), to_device(call, device))
                hidden[index] = output.cpu()
                progress.update()
            # The types of norms and biases come back exactly; rounded weights are never read from the model again.
            block.module.to(device="cpu", dtype=stored_dtype)


def round_blocks_to_nearest(model: PreTrainedModel, spec: ParentSpec) -> Iterator[RoundedLayer]:
    """Every linear layer of ``model``'s blocks, rounded to nearest at 8 bits: the baseline, without calibration text."""
    objective = JointObjective(spec.slice_rule, {8: 1.0}, {8: 1.0})
    blocks = find_blocks(model)
    for block in tqdm(blocks, desc="rounding", unit="block", disable=None):
        for name, linear in block.linears.items():
            _check_finite(linear.weight, name, "weights")
            codes, scales = round_to_nearest(linear.weight, objective, spec.group_size, getattr(torch, spec.scale_dtype))
            yield RoundedLayer(name, codes, scales, {})


def _collect(
    block: Block, hidden: Sequence[torch.Tensor], calls: Sequence[Any], device: torch.device, progress: tqdm
) -> list[tuple[list[str], torch.Tensor]]:
    """Layers that share their input, with its Hessian float32 [K, K], in the order of the first of them."""
    groups = _shared_inputs(block, hidden[0].to(device), to_device(calls[0], device))
    accumulators = [HessianAccumulator(block.linears[names[0]].in_features, device) for names in groups]
    hooks = [
        block.linears[names[0]].register_forward_pre_hook(lambda _, args, to=accumulator: to.add(args[0]))
        for names, accumulator in zip(groups, accumulators, strict=True)
    ]
    try:
        for batch, call in zip(hidden, calls, strict=True):
            replay(block, batch.to(device), to_device(call, device))
            progress.update()
    finally:
        for hook in hooks:
            hook.remove()
    return [(names, accumulator.mean()) for names, accumulator in zip(groups, accumulators, strict=True)]


def _shared_inputs(block: Block, hidden: torch.Tensor, call: Any) -> list[list[str]]:
    """Names of the block's linear layers, grouped by the tensor that they are called with."""
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
        replay(block, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in seen]


def _round_shared(
    block: Block,
    names: Sequence[str],
    hessian: torch.Tensor,
    stages: Sequence[JointObjective],
    settings: RoundingSettings,
    spec: ParentSpec,
    propagate: int,
) -> Iterator[RoundedLayer]:
    """Round the layers ``names``, which share ``hessian``, as one; leave their values at width ``propagate`` in the block."""
    for name in names:
        _check_finite(block.linears[name].weight, name, "weights")
    _check_finite(hessian, names[0], "inputs")
    weights = [block.linears[name].weight for name in names]
    stacked_codes, stacked_scales = round_layer(torch.cat(weights), hessian, stages, settings, names[0])
    rows = [weight.shape[0] for weight in weights]
    for name, weight, codes, scales in zip(names, weights, stacked_codes.split(rows), stacked_scales.split(rows), strict=True):
        values = {
            width: dequantize(codes, scales, width, check_rule(spec.slice_rule), spec.group_size)
            for width in {*WIDTHS, propagate}
        }
        errors = {width: _relative_error(weight, values[width], hessian) for width in WIDTHS}
        weight.copy_(values[propagate])
        yield RoundedLayer(name, codes.cpu(), scales.cpu(), errors)


def _relative_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Squared error of the outputs of ``rounded`` [N, K] over the squared outputs of ``weight`` [N, K]."""
    return _energy(weight - rounded, hessian) / max(_energy(weight, hessian), torch.finfo(torch.float32).tiny)


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((weight @ hessian) * weight).sum())


def _check_finite(values: torch.Tensor, name: str, kind: str) -> None:
    if not torch.isfinite(values).all():
        raise InputError(f"{name}: its {kind} hold NaN or infinite values; the model cannot be calibrated, check its files")
