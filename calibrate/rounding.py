"""Round the weights of layers that share their inputs: one code per weight, the error of every width made up for.

What GPTQ does for one width (arXiv 2210.17323, algorithm 1) happens here for all of them at once. Every width r has its
own values V_r, its own Hessian H_r and its own target T_r, and what is minimized is

    sum over r of weight_r * tr((T_r - V_r) H_r (T_r - V_r)^T)

One pass over the columns chooses codes greedily, each width making up for its own errors in the columns to come; sweeps of
coordinate descent then go over all columns again. (MatGPTQ, arXiv 2602.03537, section 3, passes on one mean error.)

A width that has a stream of its own sees inputs X_r that come from a model rounded to it; they differ from the original
model's inputs X, and the target moves towards the weights that undo that, W X^T X_r (X_r^T X_r)^-1, by ``asymmetry``
(GPTAQ, arXiv 2504.02692, section 3).

    name     shape            dtype
    weight   [N, K]           floating, outputs x inputs
    columns  [K, N]           float32: inside, a column of weights is a contiguous row
    codes    [N, K]           uint8
    scales   [N, num_groups]  the stored type
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from calibrate import column_sweep
from calibrate.factoring import Factored, factored
from calibrate.objective import LevelTables
from calibrate.scales import divisor, full_range_scales, search_scales
from calibrate.statistics import InputStatistics
from calibrate.tensor_float import tensor_float_32
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SliceRule, nearest_codes

RUN_COLUMNS = 32
"""Columns handled by one call of the sweep."""

BLOCK_COLUMNS = 128
"""Columns whose errors are passed on to the columns after them in one matrix product."""

CHUNK_WEIGHTS = 1 << 28
"""Weights rounded at once; ten float32 numbers are held for each."""

UNNAMED_WEIGHT = 1e-6
"""Share of the least weight that a width gets which nobody asked for: its bits should still be sensible."""


@dataclass(frozen=True)
class RoundingSettings:
    """How to round; the same for all layers."""

    slice_rule: SliceRule
    group_size: int
    scale_dtype: torch.dtype
    width_weights: Mapping[int, float]
    """Weight of each width's squared error."""
    damp: float = 0.01
    """Share of the mean Hessian diagonal added to the diagonal."""
    asymmetry: float = 0.5
    """0: round the weights; 1: round the weights that make up for the inputs' errors. Only for widths with a stream."""
    sweeps: int = 4
    """Sweeps of coordinate descent after the column pass."""


@dataclass(frozen=True)
class RoundedWeights:
    """The result for the layers that were stacked along N."""

    codes: torch.Tensor
    """uint8 [N, K]."""
    scales: torch.Tensor
    """[N, num_groups]."""
    squared_errors: torch.Tensor
    """float32 [5, N]: mean squared error of each output at each width, on the inputs of that width's stream."""
    squared_outputs: torch.Tensor
    """float32 [5, N]: mean square of each output of the original weights, on the same inputs."""

    def relative_errors(self, rows: slice) -> dict[int, float]:
        """Width -> squared error of the outputs ``rows`` relative to their squared values."""
        errors, outputs = self.squared_errors[:, rows].sum(1), self.squared_outputs[:, rows].sum(1)
        ratios = errors / outputs.clamp_min(torch.finfo(torch.float32).tiny)
        return dict(zip(WIDTHS, ratios.tolist(), strict=True))


@dataclass(frozen=True)
class _Stream:
    """What the inputs of one stream say."""

    hessian: Factored
    shift: torch.Tensor | None
    """float32 [K, K]: X_r^T X - X_r^T X_r per token; None for the original stream, or without asymmetry."""


def round_layers(
    weight: torch.Tensor, statistics: Mapping[int | None, InputStatistics], settings: RoundingSettings, name: str
) -> RoundedWeights:
    """Codes and scales of a layer, or of several layers stacked along N that share their inputs.

    Args:
        weight: floating [N, K].
        statistics: of each width's stream, and of the original inputs (None), which serve widths without a stream. Their
            tensors are overwritten: those of a wide layer take gigabytes each.
        name: the layer, for warnings.
    """
    streams = {width: _stream(given, settings, name) for width, given in statistics.items()}
    of_width = [streams[width if width in streams else None] for width in WIDTHS]
    tables = LevelTables.of(settings.slice_rule, weight.device)
    weights = _width_weights(settings.width_weights, weight.device)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    with tensor_float_32():  # Errors at all widths stay the same to four digits.
        chunks = [_round_rows(part, of_width, weights, tables, settings) for part in weight.split(rows)]
    return RoundedWeights(
        torch.cat([chunk.codes for chunk in chunks]),
        torch.cat([chunk.scales for chunk in chunks]),
        torch.cat([chunk.squared_errors for chunk in chunks], dim=1),
        torch.cat([chunk.squared_outputs for chunk in chunks], dim=1),
    )


def round_to_nearest(
    weight: torch.Tensor, rule: SliceRule, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The baseline: scales at which nothing clips, and the nearest 8-bit code of every weight.

    Args:
        weight: floating [N, K].

    Returns:
        codes uint8 [N, K] and scales ``scale_dtype`` [N, num_groups].
    """
    columns = weight.float().t().contiguous()
    size = columns.shape[0] if group_size == -1 else group_size
    scales = torch.stack([full_range_scales(group, rule, scale_dtype) for group in columns.split(size)])
    codes = nearest_codes(columns / divisor(scales)[_group_of(columns.shape[0], group_size, columns.device)], rule)
    return codes.t().contiguous(), scales.t().contiguous().to(scale_dtype)


def _stream(statistics: InputStatistics, settings: RoundingSettings, name: str) -> _Stream:
    shift = None
    if statistics.cross is not None and settings.asymmetry > 0:
        shift = statistics.cross.sub_(statistics.hessian)
    return _Stream(factored(statistics.hessian, settings.damp, name), shift)


def _round_rows(
    weight: torch.Tensor,
    of_width: list[_Stream],
    weights: torch.Tensor,
    tables: LevelTables,
    settings: RoundingSettings,
) -> RoundedWeights:
    columns = weight.float().t().contiguous()
    k, n = columns.shape
    hessians = [stream.hessian.damped for stream in of_width]
    factors = [stream.hessian.factor for stream in of_width]
    importance = torch.stack([hessian.diagonal() for hessian in hessians])
    scales = search_scales(columns, importance, weights, tables.rule, settings.group_size, settings.scale_dtype)
    of_column = scales[_group_of(k, settings.group_size, columns.device)]  # [K, N]

    targets = _targets(columns, of_width, settings.asymmetry)
    codes = torch.empty((k, n), dtype=torch.uint8, device=columns.device)
    base = torch.stack(targets)  # [5, K, N]
    values = torch.empty_like(base)
    _column_pass(base, values, codes, factors, of_column, weights, tables)
    gradient = base  # used up by the pass, and of the size that is needed now
    for row, (hessian, target) in enumerate(zip(hessians, targets, strict=True)):
        torch.mm(hessian, target - values[row], out=gradient[row])
    for _ in range(settings.sweeps):
        _descent_pass(gradient, values, codes, hessians, of_column, weights, tables)
    errors = torch.stack([_energy(columns - value, hessian) for value, hessian in zip(values, hessians, strict=True)])
    outputs = _per_stream(of_width, lambda stream: _energy(columns, stream.hessian.damped))
    return RoundedWeights(
        codes.t().contiguous(), scales.t().contiguous().to(settings.scale_dtype), errors, torch.stack(outputs)
    )


def _column_pass(
    base: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    factors: list[torch.Tensor],
    scales: torch.Tensor,
    weights: torch.Tensor,
    tables: LevelTables,
) -> None:
    """Fill ``codes`` [K, N] and ``values`` [5, K, N]; ``base`` [5, K, N], the targets, is used up."""
    sweep = _sweep_for(base.device)
    k = codes.shape[0]
    for start in range(0, k, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, k)
        inside = torch.stack([factor[start:stop, start:stop] for factor in factors])  # [5, block, block]
        told = torch.empty_like(base[:, start:stop])
        for first in range(start, stop, RUN_COLUMNS):
            last = min(first + RUN_COLUMNS, stop)
            run = slice(first - start, last - start)
            codes[first:last], told[:, run] = sweep(
                base[:, first:last], values[:, first:last], inside[:, run, run], scales[first:last], weights, tables, False
            )
            if last < stop:
                later = inside[:, run, run.stop :].transpose(1, 2)
                base[:, last:stop].baddbmm_(later, told[:, run], alpha=-1)
        for row, factor in enumerate(factors):
            base[row, stop:].addmm_(factor[start:stop, stop:].t(), told[row], alpha=-1)


def _descent_pass(
    gradient: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    hessians: list[torch.Tensor],
    scales: torch.Tensor,
    weights: torch.Tensor,
    tables: LevelTables,
) -> None:
    """Better ``codes`` [K, N]; ``values`` and ``gradient``, H (T - V)^T, both [5, K, N], follow them."""
    sweep = _sweep_for(gradient.device)
    k = codes.shape[0]
    for start in range(0, k, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, k)
        inside = torch.stack([hessian[start:stop, start:stop] for hessian in hessians])  # [5, block, block]
        local = gradient[:, start:stop].clone()
        told = torch.empty_like(local)
        for first in range(start, stop, RUN_COLUMNS):
            last = min(first + RUN_COLUMNS, stop)
            run = slice(first - start, last - start)
            codes[first:last], told[:, run] = sweep(
                local[:, run], values[:, first:last], inside[:, run, run], scales[first:last], weights, tables, True
            )
            if last < stop:
                local[:, run.stop :].baddbmm_(inside[:, run.stop :, run], told[:, run], alpha=-1)
        for row, hessian in enumerate(hessians):
            gradient[row].addmm_(hessian[:, start:stop], told[row], alpha=-1)


def _sweep_for(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if device.type != "cuda":
        return column_sweep.sweep_columns
    from calibrate import column_kernel  # Triton is on GPU machines only

    return column_kernel.sweep_columns


def _targets(columns: torch.Tensor, of_width: list[_Stream], asymmetry: float) -> list[torch.Tensor]:
    """What each width aims at, float32 [K, N] each."""

    def target(stream: _Stream) -> torch.Tensor:
        if stream.shift is None:
            return columns
        factor = stream.hessian.factor
        return torch.addmm(columns, factor.t(), factor @ (stream.shift @ columns), alpha=asymmetry)

    return _per_stream(of_width, target)


def _per_stream(of_width: list[_Stream], function: Callable[[_Stream], torch.Tensor]) -> list[torch.Tensor]:
    """``function`` of the stream of every width, computed once for those that share one."""
    found: dict[int, torch.Tensor] = {}
    for stream in of_width:
        if id(stream) not in found:
            found[id(stream)] = function(stream)
    return [found[id(stream)] for stream in of_width]


def _energy(columns: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Mean square of the outputs of weights [K, N] -> [N]."""
    return (columns * (hessian @ columns)).sum(0)


def _width_weights(given: Mapping[int, float], device: torch.device) -> torch.Tensor:
    """float32 [5]."""
    least = min(given.values()) * UNNAMED_WEIGHT
    return torch.tensor([given.get(width, least) for width in WIDTHS], dtype=torch.float32, device=device)


def _group_of(k: int, group_size: int, device: torch.device) -> torch.Tensor:
    """Group of each input, int64 [K]."""
    return torch.arange(k, device=device) // (k if group_size == -1 else group_size)
