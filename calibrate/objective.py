"""The joint objective of all widths: one code per weight, many values read from it.

With scaled weight v = w / s and level L_r(q) of code q at width r, the objective of a code is

    sum over r of weight_r * (v - L_r(q))^2  =  (v - A(q))^2 + V(q)        (weights sum to 1)

where A is the weighted mean and V the weighted variance of the levels of q: two tables of 256 entries hold it all.

Under ``nested`` the thresholds of every width are thresholds of 8 bits, so the code nearest to v is best at every width.
Under ``round`` a width r < 8 slices at integers, so floor(v) is best for all of them, while 8 bits alone may prefer
floor(v) + 1; any code further away is no better at any width. So two candidates suffice, instead of 256
(MatGPTQ, arXiv 2602.03537, section 3, searches them all).
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch

from matgptq_vllm.core.precision import PARENT_WIDTH
from matgptq_vllm.core.slicing import ZERO_LEVEL, SliceRule, bits_read, check_rule, levels, nearest_codes

NUM_CODES = 1 << PARENT_WIDTH

Bounds: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Smallest and largest code allowed for each weight, both uint8."""


class JointObjective:
    """Which code is best for a weight, how good it is, and which error it leaves to later columns.

    Args:
        rule: slice rule.
        weights: width -> weight of its squared error, in choosing codes and scales.
        compensation: width -> weight of its error in what is passed on to the columns not yet rounded.
        device: where the tables live.
    """

    def __init__(
        self,
        rule: str,
        weights: Mapping[int, float],
        compensation: Mapping[int, float],
        device: torch.device | str = "cpu",
    ):
        self.rule = check_rule(rule)
        self.widths = tuple(sorted(compensation))
        """Widths made up for."""
        values = _level_table(rule, weights)
        share = _shares(weights)
        mean = share @ values
        self._mean = mean.float().to(device)  # A, [256]
        self._variance = (share @ (values - mean) ** 2).float().to(device)  # V, [256]
        self._passed_on = (_shares(compensation) @ _level_table(rule, compensation)).float().to(device)  # [256]

    def choose(self, scaled: torch.Tensor, bounds: Bounds | None = None) -> torch.Tensor:
        """Best code of each scaled weight (float32, any shape), within ``bounds`` if given -> uint8, same shape."""
        if self.rule == "nested":
            nearest = nearest_codes(scaled, self.rule)
            return nearest if bounds is None else nearest.clamp_(*bounds)
        below = (scaled + ZERO_LEVEL).floor_().clamp_(0, NUM_CODES - 1).to(torch.uint8)
        if bounds is not None:
            below.clamp_(*bounds)
        above = (below + (below < (NUM_CODES - 1 if bounds is None else bounds[1]))).to(torch.uint8)
        return torch.where(self.loss(scaled, above) < self.loss(scaled, below), above, below)

    def loss(self, scaled: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Objective of ``codes`` (uint8) for ``scaled`` (float32, same shape), in units of the squared scale."""
        index = codes.int()
        return (scaled - self._mean[index]).square_().add_(self._variance[index])

    def mean_levels(self, codes: torch.Tensor) -> torch.Tensor:
        """Mean level over the compensation widths of ``codes`` (uint8) -> float32, same shape."""
        return self._passed_on[codes.int()]


def bounds_of(codes: torch.Tensor, width: int, rule: SliceRule) -> Bounds:
    """The codes with the same values as ``codes`` (uint8, any shape) at ``width`` and at every narrower one."""
    free = PARENT_WIDTH - bits_read(width, rule)
    low = (codes >> free) << free
    return low, low + ((1 << free) - 1)


def _shares(weights: Mapping[int, float]) -> torch.Tensor:
    share = torch.tensor(list(weights.values()), dtype=torch.float64)
    return share / share.sum()


def _level_table(rule: str, widths: Mapping[int, float]) -> torch.Tensor:
    """float64 [num widths, 256]."""
    codes = torch.arange(NUM_CODES, dtype=torch.int64).to(torch.uint8)
    return torch.stack([levels(codes, width, check_rule(rule), torch.float64) for width in widths])
