"""Group scales: the largest weight, or a clipped range where the joint objective says that clipping pays.

Scales are rounded to the stored type before any code is chosen, so that codes fit the scales that readers will see.
"""

from collections.abc import Sequence

import torch

from calibrate.objective import JointObjective
from matgptq_vllm.core.slicing import SliceRule, num_groups

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Shares of the largest weight tried as the end of the range."""


def half_range(rule: SliceRule) -> float:
    """Largest absolute scaled weight that a code is within half a step of."""
    return 128.0 if rule == "nested" else 127.5


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
    weight: torch.Tensor,
    importance: torch.Tensor,
    objective: JointObjective,
    dtype: torch.dtype,
    clips: Sequence[float] = CLIPS,
) -> torch.Tensor:
    """For every output the scale whose best codes lose least under the joint objective.

    Args:
        weight: float32 [group, N], one group of inputs.
        importance: float32 [group], weight of each input's squared error: the Hessian's diagonal.
        dtype: type in which scales are stored.
        clips: shares of the largest weight to try.

    Returns:
        float32 [N], exact in ``dtype``.
    """
    largest = weight.abs().amax(0) / half_range(objective.rule)
    best_scale = torch.zeros_like(largest)
    best_loss = torch.full_like(largest, torch.inf)
    for clip in clips:
        scale = _stored(largest * clip, dtype)
        scaled = weight / divisor(scale)
        loss = (importance @ objective.loss(scaled, objective.choose(scaled))).mul_(scale.square())
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def static_scales(
    weight: torch.Tensor,
    importance: torch.Tensor,
    objective: JointObjective,
    group_size: int,
    dtype: torch.dtype,
    clips: Sequence[float] = CLIPS,
) -> torch.Tensor:
    """Scales of all groups, searched on the weights as they are before any compensation.

    Args:
        weight: float32 [K, N].
        importance: float32 [K].

    Returns:
        float32 [num_groups, N].
    """
    k = weight.shape[0]
    size = k if group_size == -1 else group_size
    groups = [slice(group * size, (group + 1) * size) for group in range(num_groups(k, group_size))]
    return torch.stack([search_scales(weight[part], importance[part], objective, dtype, clips) for part in groups])


def divisor(scale: torch.Tensor) -> torch.Tensor:
    """``scale``, with 1 in place of 0: a group of zeros has scale 0 and any code."""
    return torch.where(scale > 0, scale, 1.0)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.to(dtype).float()
