"""What rounding needs to know about the inputs of layers, summed over batches and over the processes of a run.

    name      shape    meaning
    hessian   [K, K]   mean over tokens of x x^T, x the inputs in this stream: the Hessian of the squared output error
    cross     [K, K]   mean over tokens of x x0^T, x0 the inputs of the same tokens in the original model

Both are float32. ``x x^T`` is symmetric, so only blocks on and above the diagonal are summed.
"""

from dataclasses import dataclass

import torch

from calibrate.ranks import Ranks

STRIPS = 4
"""Strips of rows that the Hessian is summed in: 4 save three eighths of the products."""

LEAST_STRIP = 128
"""Narrower strips would save less than small products lose."""


@dataclass(frozen=True)
class InputStatistics:
    """The inputs of layers that share them, in one stream."""

    hessian: torch.Tensor
    """float32 [K, K]; 0 where no token was seen."""

    cross: torch.Tensor | None
    """float32 [K, K]; None for the original stream, and where it was not asked for."""

    num_tokens: int
    """Tokens that the means are over."""


class StatisticsAccumulator:
    """Sums over batches.

    Args:
        k: inputs of the layers.
        with_cross: whether ``add`` will be given the original inputs too.
    """

    def __init__(self, k: int, device: torch.device, with_cross: bool = False):
        width = max(LEAST_STRIP, -(-k // STRIPS))
        self._k = k
        self._starts = list(range(0, k, width))
        self._strips = [torch.zeros((min(width, k - start), k - start), device=device) for start in self._starts]
        self._cross = torch.zeros((k, k), device=device) if with_cross else None
        self._num_tokens = 0

    def add(self, inputs: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add a batch of inputs, floating [..., K], and those of the same tokens in the original model."""
        rows = _rows(inputs)
        for start, strip in zip(self._starts, self._strips, strict=True):
            _add_product(strip, rows[:, start : start + strip.shape[0]], rows[:, start:])
        if self._cross is not None:
            assert original is not None
            _add_product(self._cross, rows, _rows(original))
        self._num_tokens += rows.shape[0]

    def finish(self, ranks: Ranks) -> InputStatistics:
        """The means over all processes. The accumulator is empty afterwards."""
        num_tokens = ranks.sum_of(self._num_tokens)
        hessian = torch.empty((self._k, self._k), device=self._strips[0].device)
        for start in reversed(self._starts):
            strip = ranks.sum_tensor(self._strips.pop()).div_(max(num_tokens, 1))
            stop = start + strip.shape[0]
            hessian[start:stop, start:] = strip
            hessian[stop:, start:stop] = strip[:, stop - start :].t()
        cross, self._cross = self._cross, None
        if cross is not None:
            cross = ranks.sum_tensor(cross).div_(max(num_tokens, 1))
        return InputStatistics(hessian, cross, num_tokens)


def _rows(inputs: torch.Tensor) -> torch.Tensor:
    """[..., K] as [tokens, K], in a type whose products this device sums in float32."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if rows.is_cuda and rows.dtype == torch.bfloat16 else rows.float()


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left^T right, with float32 sums: [M, N], [tokens, M], [tokens, N]."""
    if left.dtype == torch.float32:
        total.addmm_(left.t(), right)
    else:
        torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
