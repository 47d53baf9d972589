"""Fit weights to the grids that other formats have: scale * (code - zero point), with integers for both.

Per group of a row. A group that lies on such a grid is represented exactly: its scale is found from its values alone, so
this file knows no slice rule and no level table. Any other group gets the scale and zero point of least squared error
that a search over shrunken ranges and two steps of alternating least squares finds.
"""

from dataclasses import dataclass

import torch

SHRINKS = tuple(0.5 + 0.025 * step for step in range(27))
"""Ranges tried, as shares of a group's own range: below 1 clips its largest weights, above 1 leaves room at the ends."""

ZERO_SHIFTS = (-1, 0, 1)
"""Zero points tried, as steps from the one that puts the weight 0 nearest to its place in the range."""

REFINEMENTS = 2
"""Least-squares steps per candidate: codes given the scale, scale given the codes."""

ELEMENTS_PER_CHUNK = 1 << 24
"""Weights fitted at a time: a bound on memory, 64 MiB per temporary in float32."""


@dataclass(frozen=True)
class GridFit:
    """A layer on an integer grid."""

    codes: torch.Tensor
    """uint8 [N, K], 0 .. 2^bits - 1."""

    scales: torch.Tensor
    """[N, groups], in the type asked for."""

    zeros: torch.Tensor
    """uint8 [N, groups]: the code of weight 0; 2^(bits - 1) everywhere in a symmetric fit."""

    def values(self) -> torch.Tensor:
        """Weights float32 [N, K]."""
        n, k = self.codes.shape
        levels = self.codes.view(n, self.scales.shape[1], -1).float() - self.zeros.float().unsqueeze(2)
        return levels.mul_(self.scales.float().unsqueeze(2)).view(n, k)


def fit_exactly(values: torch.Tensor, group_size: int, bits: int, scale_dtype: torch.dtype) -> GridFit | None:
    """The symmetric fit that is ``values`` bit for bit; None if there is none.

    Args:
        values: float32 [N, K], K a multiple of ``group_size``.
        group_size: inputs per scale.
        bits: of a code, 2 .. 8.
        scale_dtype: type of the scales; only scales that it holds are considered.
    """
    n, k = values.shape
    half = 1 << (bits - 1)
    codes = torch.empty(n, k, dtype=torch.uint8, device=values.device)
    scales = torch.empty(n, k // group_size, dtype=scale_dtype, device=values.device)
    rows = _rows_per_chunk(k)
    for start in range(0, n, rows):
        chunk = values[start : start + rows]
        groups = chunk.reshape(-1, group_size)
        found = _exact_scales(groups, half, scale_dtype)
        if found is None:
            return None
        scales[start : start + rows] = found.view(len(chunk), -1).to(scale_dtype)
        codes[start : start + rows] = (groups / found).round_().add_(half).to(torch.uint8).view(len(chunk), k)
    return GridFit(codes, scales, torch.full(scales.shape, half, dtype=torch.uint8, device=values.device))


def fit_nearest(
    values: torch.Tensor, group_size: int, bits: int, scale_dtype: torch.dtype, zero_points: bool = False
) -> GridFit:
    """A fit of small squared error.

    Args:
        values: float32 [N, K], K a multiple of ``group_size``.
        group_size: inputs per scale.
        bits: of a code, 2 .. 8.
        scale_dtype: type of the scales; the error is that of scales rounded to it.
        zero_points: choose a zero point per group, instead of the middle code.
    """
    n, k = values.shape
    chunks = [chunk.reshape(-1, group_size) for chunk in values.split(_rows_per_chunk(k))]
    parts = [_search(chunk, bits, scale_dtype, zero_points) for chunk in chunks]
    codes, scales, zeros = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return GridFit(codes.view(n, k), scales.view(n, -1).to(scale_dtype), zeros.view(n, -1))


def _rows_per_chunk(k: int) -> int:
    return max(1, ELEMENTS_PER_CHUNK // k)


def _exact_scales(groups: torch.Tensor, half: int, scale_dtype: torch.dtype) -> torch.Tensor | None:
    """Scales float32 [G, 1] of which groups float32 [G, group_size] are multiples -half .. half - 1; None if there are none."""
    scales = torch.ones(len(groups), 1, device=groups.device)
    # The largest weight of a group is some integer times its scale. Try them all, on the groups without a scale so far.
    peaks = groups.abs().amax(1, keepdim=True)
    pending = peaks.squeeze(1).nonzero().squeeze(1)
    for multiple in range(half, 0, -1):
        candidates = _representable(peaks[pending] / multiple, scale_dtype)
        levels = (groups[pending] / candidates).round_()
        on_grid = ((levels * candidates == groups[pending]) & (levels >= -half) & (levels < half)).all(1)
        scales[pending[on_grid]] = candidates[on_grid]
        pending = pending[~on_grid]
        if not len(pending):
            return scales
    return None


def _search(
    groups: torch.Tensor, bits: int, scale_dtype: torch.dtype, zero_points: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [G, group_size], scales float32 [G, 1] and zero points uint8 [G, 1] of groups float32 [G, group_size]."""
    top = (1 << bits) - 1
    best_error = torch.full_like(groups[:, :1], float("inf"))
    best_codes = torch.zeros_like(groups)
    best_scales = torch.ones_like(best_error)
    best_zeros = torch.full_like(best_error, (top + 1) / 2)
    for scales, zeros in _candidates(groups, top, zero_points):
        scales = _representable(scales, scale_dtype)
        for _ in range(REFINEMENTS + 1):
            codes = (groups / scales + zeros).round_().clamp_(0, top)
            levels = codes - zeros
            error = (levels * scales - groups).square_().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_codes = torch.where(better, codes, best_codes)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
            fitted = (levels * groups).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True).clamp_min_(1)
            scales = _representable(torch.where(fitted > 0, fitted, scales), scale_dtype)
    return best_codes.to(torch.uint8), best_scales, best_zeros.to(torch.uint8)


def _candidates(groups: torch.Tensor, top: int, zero_points: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zero points to start from, float32 [G, 1] each."""
    if not zero_points:
        peaks = groups.abs().amax(1, keepdim=True)
        middle = torch.full_like(peaks, (top + 1) / 2)
        return [(peaks * (shrink * 2 / top), middle) for shrink in SHRINKS]
    low, high = groups.amin(1, keepdim=True).clamp_max_(0), groups.amax(1, keepdim=True).clamp_min_(0)
    found = []
    for shrink in SHRINKS:
        scales = (high - low) * (shrink / top)
        nearest = (-low * shrink / scales.clamp_min(torch.finfo(scales.dtype).tiny)).round_()
        found += [(scales, (nearest + shift).clamp_(0, top)) for shift in ZERO_SHIFTS]
    return found


def _representable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as ``dtype`` holds them, in float32, none of them 0: a group of zeros divides by its scale too."""
    return scales.clamp_min(torch.finfo(dtype).smallest_normal).to(dtype).float()
