"""Group scales: the largest weight of a group, or a clipped range where the joint objective says that clipping pays.

Scales are rounded to the stored type before any code is chosen, so that codes fit the scales that readers will see.
"""

import torch

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import ZERO_LEVEL, SliceRule, bend, levels, nearest_codes, num_groups

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Shares of the largest weight tried as the end of the range."""


def half_range(rule: SliceRule) -> float:
    """Largest absolute scaled weight that a code is within half a step of."""
    if rule == "round":
        return ZERO_LEVEL - 0.5
    return bend(torch.tensor(float(ZERO_LEVEL))).item() if rule == "curved" else float(ZERO_LEVEL)


def full_range_scales(weight: torch.Tensor, rule: SliceRule, dtype: torch.dtype) -> torch.Tensor:
    """Scales at which nothing clips.

    Args:
        weight: float32 [group, N], one group of inputs.
        dtype: type in which scales are stored.

    Returns:
        float32 [N], exact in ``dtype``; 0 where all weights of the group are 0.
    """
    return _stored(weight.abs().amax(0) / half_range(rule), dtype)


def search_scales(
    columns: torch.Tensor,
    importance: torch.Tensor,
    weights: torch.Tensor,
    rule: SliceRule,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """For every group and output the scale whose nearest codes lose least, summed over the widths.

    While all widths have the same target, the nearest code is (under ``nested``) the best one at every width, so no
    search over codes is needed here.

    Args:
        columns: float32 [K, N], weights.
        importance: float32 [5, K], of each input's squared error at each width: the Hessian's diagonal.
        weights: float32 [5], of each width in the joint objective.
        group_size: inputs per group; -1 for one group.
        dtype: type in which scales are stored.

    Returns:
        float32 [num_groups, N], exact in ``dtype``.
    """
    k = columns.shape[0]
    size = k if group_size == -1 else group_size
    cost = (importance * weights[:, None])[:, :, None]  # [5, K, 1]
    found = []
    for group in range(num_groups(k, group_size)):
        part = slice(group * size, (group + 1) * size)
        largest = columns[part].abs().amax(0) / half_range(rule)
        best_scale = torch.zeros_like(largest)
        best_loss = torch.full_like(largest, torch.inf)
        for clip in CLIPS:
            scale = _stored(largest * clip, dtype)
            scaled = columns[part] / divisor(scale)
            codes = nearest_codes(scaled, rule)
            loss = torch.zeros_like(largest)
            for row, width in enumerate(WIDTHS):
                loss += (cost[row, part] * (scaled - levels(codes, width, rule)).square_()).sum(0)
            loss *= scale.square()
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scale = torch.where(better, scale, best_scale)
        found.append(best_scale)
    return torch.stack(found)


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """``scale``, with 1 in place of 0: a group of zeros has scale 0 and any code."""
    return torch.where(scale > 0, scale, 1.0)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.to(dtype).float()
