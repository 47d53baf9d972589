"""The slice rules: what value a parent's code has when only its top bits are read. The only bit-slice arithmetic in torch.

With code q in 0..255, width r, d = 8 - r and group scale s, the value is s * level, where

    rule     slice c                                        level(c)
    nested   floor(q / 2^d)                                 (c + 1/2) * 2^d - 128
    curved   floor(q / 2^d)                                 bend((c + 1/2) * 2^d - 128)
    round    min(floor(q / 2^d + 1/2), 2^r - 1)             c * 2^d - 128

    bend(x) = x * (1 + |x| / 256)                           from -128..128 onto -192..192

``nested`` reads exactly r bits and is a mid-rise quantizer of the same range at every width. ``curved`` is ``nested`` with
levels that lie closer together near 0, where most weights are, at every width; so a range that clips nothing at 8 bits is
also a good one at 2. As 256 * bend(x) = (x + 128)^2 - 128^2 for x >= 0, a kernel that puts the bits of x into a number
128 + x needs one multiplication and addition (kernels.lanes_ptx). ``round`` is the rule of the published method (MatGPTQ,
arXiv 2602.03537, section 3: slicing with round-half-up and clamping); it needs bit r+1 too.
"""

from typing import Literal, get_args

import torch

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import PARENT_WIDTH, check_width
from matgptq_vllm.core.shapes import bits_read as bits_read
from matgptq_vllm.core.shapes import num_groups as num_groups

SliceRule = Literal["nested", "curved", "round"]
SLICE_RULES: tuple[SliceRule, ...] = get_args(SliceRule)

ZERO_LEVEL = 1 << (PARENT_WIDTH - 1)
"""Offset between codes and levels: code 128 sits at, or half a step above, the weight 0."""

BEND = 1 / (2 * ZERO_LEVEL)
"""bend(x) = x * (1 + BEND * |x|): dyadic, so that every bent level is exact in float32."""


def check_rule(rule: str) -> SliceRule:
    """Return ``rule`` if it is a slice rule; InputError otherwise."""
    if rule not in SLICE_RULES:
        raise InputError(f"slice rule {rule!r} is unknown; use one of {', '.join(SLICE_RULES)}")
    return rule


def slice_codes(codes: torch.Tensor, width: int, rule: SliceRule) -> torch.Tensor:
    """Slice c of each code at ``width``.

    Args:
        codes: uint8, any shape. Bits below ``bits_read(width, rule)`` are ignored.

    Returns:
        uint8, same shape, values 0 .. 2^width - 1.
    """
    drop = PARENT_WIDTH - check_width(width)
    if drop == 0:
        return codes
    if rule != "round":
        return codes >> drop
    # floor(q / 2^d + 1/2) = floor(q / 2^d) + (the highest dropped bit)
    rounded = (codes >> drop) + ((codes >> (drop - 1)) & 1)
    return rounded.clamp_(max=(1 << width) - 1)


def levels(codes: torch.Tensor, width: int, rule: SliceRule, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Value of each code at ``width`` in units of its group scale.

    Args:
        codes: uint8, any shape.
        dtype: floating type of the result. Every level is exact in float32, those of ``nested`` and ``round`` in float16
            and bfloat16 too.

    Returns:
        ``dtype``, same shape, values in -128 .. 128, or -192 .. 192 under ``curved``.
    """
    step = 1 << (PARENT_WIDTH - check_width(width))
    offset = (0.0 if rule == "round" else step / 2) - ZERO_LEVEL
    straight = slice_codes(codes, width, rule).to(dtype if rule != "curved" else torch.float32).mul_(step).add_(offset)
    return bend(straight).to(dtype) if rule == "curved" else straight


def bend(straight: torch.Tensor) -> torch.Tensor:
    """Levels of ``curved`` from those of ``nested``: floating, any shape -> same."""
    return straight * (1 + BEND * straight.abs())


def unbend(bent: torch.Tensor) -> torch.Tensor:
    """Inverse of ``bend``: floating, any shape -> same."""
    size = ((1 + 4 * BEND * bent.abs()).sqrt() - 1) / (2 * BEND)
    return torch.copysign(size, bent)


def nearest_codes(scaled: torch.Tensor, rule: SliceRule) -> torch.Tensor:
    """Code whose level at 8 bits is nearest to each value (under ``curved``: whose bin holds it).

    Args:
        scaled: floating, any shape: weights divided by their group scale.

    Returns:
        uint8, same shape.
    """
    straight = unbend(scaled) if rule == "curved" else scaled
    shifted = straight + ZERO_LEVEL
    nearest = shifted.round() if rule == "round" else shifted.floor()
    return nearest.clamp_(0, (1 << PARENT_WIDTH) - 1).to(torch.uint8)


def expand_scales(scales: torch.Tensor, k: int, group_size: int) -> torch.Tensor:
    """Scale of every weight.

    Args:
        scales: [N, num_groups(k, group_size)].

    Returns:
        [N, k], or [N, 1] for one scale per channel (broadcasts against [N, k]).
    """
    if group_size == -1:
        return scales
    return scales.repeat_interleave(group_size, dim=1)[:, :k]


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    width: int,
    rule: SliceRule,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Weights of a layer read at ``width``.

    Args:
        codes: uint8 [N, K].
        scales: floating [N, num_groups(K, group_size)].
        dtype: type of the arithmetic and of the result.

    Returns:
        ``dtype`` [N, K].
    """
    weights = levels(codes, width, rule, dtype)
    n, k = codes.shape
    scales = scales.to(dtype)
    if group_size == -1 or k % group_size:
        return weights.mul_(expand_scales(scales, k, group_size))
    weights.view(n, -1, group_size).mul_(scales.unsqueeze(2))
    return weights
