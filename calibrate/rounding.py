"""Round the weights of a layer, column by column, each column making up for the errors of those before it.

The loop is GPTQ's (arXiv 2210.17323, algorithm 1), with MatGPTQ's changes (arXiv 2602.03537, section 3): a code is chosen
for all widths at once, and the error passed on is that of the mean value over the compensation widths.

    name     shape            dtype     meaning
    weight   [N, K]           float32   outputs x inputs
    factor   [K, K]           float32   upper Cholesky factor of the inverse Hessian
    codes    [N, K]           uint8
    scales   [N, num_groups]  float32   exact in the stored type

Inside the loop everything is transposed, so that a column of weights is a contiguous row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibrate.hessian import damped, inverse_factor
from calibrate.objective import JointObjective
from calibrate.scales import divisor, full_range_scales, search_scales, static_scales
from matgptq_vllm.core.slicing import nearest_codes, num_groups

BLOCK_COLUMNS = 128
"""Columns between two updates of all later columns; a multiple of every group size, so that groups begin in one block."""


@dataclass(frozen=True)
class RoundingSettings:
    """How a layer is rounded."""

    group_size: int
    scale_dtype: torch.dtype
    damp: float
    act_order: bool


def round_layer(
    weight: torch.Tensor, hessian: torch.Tensor, objective: JointObjective, settings: RoundingSettings, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a layer, or of several layers stacked along N that share their inputs.

    Args:
        weight: floating [N, K].
        hessian: float32 [K, K], not damped.
        name: the layer, for warnings.

    Returns:
        codes uint8 [N, K] and scales [N, num_groups] of ``settings.scale_dtype``.
    """
    columns = weight.float().t().contiguous()
    if columns.data_ptr() == weight.data_ptr():
        columns = columns.clone()
    importance = damped(hessian, settings.damp).diagonal()
    if settings.act_order:
        codes, scales = _round_by_importance(columns, hessian, importance, objective, settings, name)
    else:
        codes, scales = _round_in_order(columns, hessian, importance, objective, settings, name)
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
) -> torch.Tensor:
    """The column loop.

    Args:
        columns: float32 or float64 [K, N]; overwritten.
        factor: [K, K] of the same type, in the same order of inputs.
        scale_of: scales [N] of a column; asked in order, when ``columns`` holds that column's block up to date.

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
            codes[column] = objective.choose(columns[column] / divisor(scale))
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
    objective: JointObjective,
    settings: RoundingSettings,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, N] and scales [num_groups, N]; a group's scales are searched when the loop reaches its first column."""
    k, n = columns.shape
    size = k if settings.group_size == -1 else settings.group_size
    scales = torch.empty((num_groups(k, settings.group_size), n), device=columns.device)

    def scale_of(column: int) -> torch.Tensor:
        if column % size == 0:
            part = slice(column, column + size)
            scales[column // size] = search_scales(columns[part], importance[part], objective, settings.scale_dtype)
        return scales[column // size]

    return round_columns(columns, inverse_factor(hessian, settings.damp, name), scale_of, objective), scales


def _round_by_importance(
    columns: torch.Tensor,
    hessian: torch.Tensor,
    importance: torch.Tensor,
    objective: JointObjective,
    settings: RoundingSettings,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_round_in_order``, the most important inputs first; scales must then be known before the loop begins."""
    scales = static_scales(columns, importance, objective, settings.group_size, settings.scale_dtype)
    group_of = _group_of(columns.shape[0], settings.group_size, columns.device)
    order = importance.argsort(descending=True, stable=True)
    groups = group_of[order].tolist()
    factor = inverse_factor(hessian[order][:, order], settings.damp, name)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    codes[order] = round_columns(columns[order], factor, lambda column: scales[groups[column]], objective)
    return codes, scales


def _group_of(k: int, group_size: int, device: torch.device) -> torch.Tensor:
    """Group of each input, int64 [K]."""
    return torch.arange(k, device=device) // (k if group_size == -1 else group_size)
