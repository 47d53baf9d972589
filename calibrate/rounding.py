"""Round the weights of a layer, column by column, each column making up for the errors of those before it.

The loop is GPTQ's (arXiv 2210.17323, algorithm 1), with MatGPTQ's changes (arXiv 2602.03537, section 3): a code is chosen
for all widths at once, and the error passed on is that of the mean value over the compensation widths.

The loop runs in stages. Each starts from the original weights and makes up for its own widths, but may change only the
bits below those of the previous stage's widths that are narrower than all of its own. So the narrow slices keep their
compensation, and the wide ones are free of its noise as far as the remaining bits reach. Stages after the first that make
up for one width end with coordinate descent.

    name     shape            dtype     meaning
    weight   [N, K]           float32   outputs x inputs
    factor   [K, K]           float32   upper Cholesky factor of the inverse Hessian
    codes    [N, K]           uint8
    scales   [N, num_groups]  float32   exact in the stored type

Inside the loop everything is transposed, so that a column of weights is a contiguous row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from calibrate.descent import descend
from calibrate.hessian import damped, inverse_factor
from calibrate.objective import Bounds, JointObjective, bounds_of
from calibrate.scales import divisor, full_range_scales, search_scales, static_scales
from matgptq_vllm.core.slicing import nearest_codes, num_groups

BLOCK_COLUMNS = 128
"""Columns between two updates of all later columns; a multiple of every group size, so that groups begin in one block."""

DESCENT_SWEEPS = 3
"""Most of what descent can gain; measured in docs/calibration.md."""


@dataclass(frozen=True)
class RoundingSettings:
    """How a layer is rounded."""

    group_size: int
    scale_dtype: torch.dtype
    damp: float
    act_order: bool


def round_layer(
    weight: torch.Tensor, hessian: torch.Tensor, stages: Sequence[JointObjective], settings: RoundingSettings, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a layer, or of several layers stacked along N that share their inputs.

    Args:
        weight: floating [N, K].
        hessian: float32 [K, K], not damped.
        stages: objectives of the stages; each later one begins at a wider width. The first chooses scales.
        name: the layer, for warnings.

    Returns:
        codes uint8 [N, K] and scales [N, num_groups] of ``settings.scale_dtype``.
    """
    columns = weight.float().t().contiguous()
    importance = damped(hessian, settings.damp).diagonal()
    if settings.act_order:
        codes, scales = _round_by_importance(columns, hessian, importance, stages, settings, name)
    else:
        codes, scales = _round_in_order(columns, hessian, importance, stages, settings, name)
    return codes.t().contiguous(), scales.t().contiguous().to(settings.scale_dtype)


def round_to_nearest(
    weight: torch.Tensor, objective: JointObjective, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The baseline: scales at which nothing clips, and the nearest 8-bit code of every weight.

    Args:
        weight: floating [N, K].

    Returns:
        codes uint8 [N, K] and scales ``scale_dtype`` [N, num_groups].
    """
    columns = weight.float().t().contiguous()
    size = columns.shape[0] if group_size == -1 else group_size
    scales = torch.stack([full_range_scales(group, objective.rule, scale_dtype) for group in columns.split(size)])
    group_of = _group_of(columns.shape[0], group_size, columns.device)
    codes = nearest_codes(columns / divisor(scales)[group_of], objective.rule)
    return codes.t().contiguous(), scales.t().contiguous().to(scale_dtype)


def round_columns(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale_of: Callable[[int], torch.Tensor],
    objective: JointObjective,
    bounds: Bounds | None = None,
) -> torch.Tensor:
    """The column loop.

    Args:
        columns: float32 or float64 [K, N]; overwritten.
        factor: [K, K] of the same type, in the same order of inputs.
        scale_of: scales [N] of a column; asked in order, when ``columns`` holds that column's block up to date.
        bounds: codes allowed for each weight, [K, N] both; None for all codes.

    Returns:
        codes uint8 [K, N].
    """
    k = columns.shape[0]
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for start in range(0, k, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, k)
        errors = torch.empty_like(columns[start:stop])
        for column in range(start, stop):
            scale = scale_of(column)
            allowed = None if bounds is None else (bounds[0][column], bounds[1][column])
            codes[column] = objective.choose(columns[column] / divisor(scale), allowed)
            error = columns[column] - objective.mean_levels(codes[column]).mul_(scale)
            error.div_(factor[column, column])
            columns[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return codes


def _round_in_order(
    columns: torch.Tensor,
    hessian: torch.Tensor,
    importance: torch.Tensor,
    stages: Sequence[JointObjective],
    settings: RoundingSettings,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, N] and scales [num_groups, N]; a group's scales are searched when the loop reaches its first column."""
    k, n = columns.shape
    size = k if settings.group_size == -1 else settings.group_size
    scales = torch.empty((num_groups(k, settings.group_size), n), device=columns.device)
    rest = columns.clone()

    def scale_of(column: int) -> torch.Tensor:
        if column % size == 0:
            part = slice(column, column + size)
            scales[column // size] = search_scales(rest[part], importance[part], stages[0], settings.scale_dtype)
        return scales[column // size]

    factor = inverse_factor(hessian, settings.damp, name)
    codes = round_columns(rest, factor, scale_of, stages[0])
    return _refine(
        columns, codes, damped(hessian, settings.damp), factor, lambda column: scales[column // size], stages
    ), scales


def _round_by_importance(
    columns: torch.Tensor,
    hessian: torch.Tensor,
    importance: torch.Tensor,
    stages: Sequence[JointObjective],
    settings: RoundingSettings,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_round_in_order``, the most important inputs first; scales must then be known before the loop begins."""
    scales = static_scales(columns, importance, stages[0], settings.group_size, settings.scale_dtype)
    group_of = _group_of(columns.shape[0], settings.group_size, columns.device)
    order = importance.argsort(descending=True, stable=True)
    groups = group_of[order].tolist()
    hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, settings.damp, name)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    ordered = columns[order]

    def scale_of(column: int) -> torch.Tensor:
        return scales[groups[column]]

    first = round_columns(ordered.clone(), factor, scale_of, stages[0])
    codes[order] = _refine(ordered, first, damped(hessian, settings.damp), factor, scale_of, stages)
    return codes, scales


def _refine(
    columns: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    factor: torch.Tensor,
    scale_of: Callable[[int], torch.Tensor],
    stages: Sequence[JointObjective],
) -> torch.Tensor:
    """Codes [K, N] after all stages but the first, which gave ``codes``."""
    for previous, stage in pairwise(stages):
        decided = max(width for width in previous.widths if width < stage.widths[0])
        bounds = bounds_of(codes, decided, stage.rule)
        codes = round_columns(columns.clone(), factor, scale_of, stage, bounds)
        if len(stage.widths) == 1:
            # With several widths the mean value is a compromise to make up for, not an aim to descend to.
            codes = descend(columns, codes, hessian, scale_of, stage, bounds, DESCENT_SWEEPS)
    return codes


def _group_of(k: int, group_size: int, device: torch.device) -> torch.Tensor:
    """Group of each input, int64 [K]."""
    return torch.arange(k, device=device) // (k if group_size == -1 else group_size)
