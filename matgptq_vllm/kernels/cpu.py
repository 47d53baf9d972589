"""The sliced linear layer on a CPU, from planes in the checkpoint layout.

A block of outputs at a time is expanded to float32, small enough to stay in a core's L2 cache, and multiplied. Codes are
joined once per block, for the widest width of the step (``kernels.cpu_words``); narrower ones take their top bits. Nothing
but the block exists besides the planes; its memory is kept between calls, as fresh pages cost more than the arithmetic.

Levels are exactly those of ``core.slicing``. Weights and sums are float32 whatever the type of x, with one exception: from
DENSE_FROM rows of a width on, where the processor multiplies bfloat16, bfloat16 x meets weights rounded to bfloat16, as in
``kernels.reference``. A row's result depends, within rounding, on how many rows share its width in the call, because the
matrix library picks its algorithm by the shape; it depends on nothing else in the batch.
"""

import threading
from collections.abc import Sequence

import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import PARENT_WIDTH
from matgptq_vllm.core.slicing import BEND, SliceRule, bits_read
from matgptq_vllm.kernels.cpu_words import CHUNK, in_word_order, keep_bits, set_bit, signed_codes

BLOCK_WEIGHTS = 1 << 18
"""Weights expanded at a time: 1 MiB, about an L2 cache. Smaller blocks stay in it entirely but take more calls of torch."""

DENSE_BLOCK_WEIGHTS = 1 << 20
"""The same for DENSE_FROM rows and more, whose product takes longer than the expansion and wants larger matrices."""

DENSE_FROM = 128
"""Rows of a width from which on large blocks are better, and bfloat16 products."""


def sliced_linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    row_widths: torch.Tensor,
    layout: PlaneLayout,
    group_size: int,
    rule: SliceRule,
) -> torch.Tensor:
    """x @ W.T, where row m of x meets the weights read at row_widths[m] bits.

    Args:
        x: floating [M, K], on the CPU like all tensors here.
        planes: leading planes of the layer, each uint8 [N, packed K]; enough for the widest of ``row_widths``.
        scales: floating [N, groups].
        row_widths: int32 [M].
        group_size: a multiple of ``cpu_words.CHUNK``, or -1.

    Returns:
        [M, N], dtype of x.
    """
    k = x.shape[1]
    ordered = in_word_order(x)
    parts = [_Part(width, rows, ordered, x.dtype, len(scales)) for width, rows in _rows_of_widths(row_widths.tolist())]
    planes = planes[: layout.num_planes(max((bits_read(part.width, rule) for part in parts), default=1))]
    bits = sum(layout.plane_widths[: len(planes)])
    factors, span = _factors(scales, k, group_size)
    block = max(1, (DENSE_BLOCK_WEIGHTS if any(part.dense for part in parts) else BLOCK_WEIGHTS) // ordered.shape[1])
    for start in range(0, len(scales), block):
        outputs = slice(start, start + block)
        codes = signed_codes(planes if block >= len(scales) else [plane[outputs] for plane in planes], layout)
        for part in parts:
            weights = _levels(codes, part.width, rule, bits)
            weights.view(-1, factors.shape[1], span).mul_(factors[outputs])
            part.multiply(weights.view(-1, ordered.shape[1]), outputs)
    if len(parts) == 1:
        return parts[0].y.to(x.dtype)
    y = x.new_empty(x.shape[0], len(scales))
    for part in parts:
        y[part.rows] = part.y.to(x.dtype)
    return y


class _Part:
    """The rows of one width and their result.

    Args:
        rows: which rows of x.
        ordered: float32 [M, K], all rows of x in word order.
        dtype: type of x.
        n: N.
    """

    def __init__(self, width: int, rows: list[int], ordered: torch.Tensor, dtype: torch.dtype, n: int):
        self.width = width
        self.rows = rows
        self.dense = len(rows) >= DENSE_FROM
        x = ordered if len(rows) == len(ordered) else ordered[rows]
        self._x = x.to(torch.bfloat16) if self.dense and dtype == torch.bfloat16 and _multiplies_bfloat16() else x
        self.y = self._x.new_empty(len(rows), n)

    def multiply(self, weights: torch.Tensor, outputs: slice) -> None:
        """Compute the given outputs from their weights, float32 [outputs, K]."""
        torch.mm(self._x, weights.to(self._x.dtype).t(), out=self.y[:, outputs])


def _rows_of_widths(row_widths: list[int]) -> list[tuple[int, list[int]]]:
    """The widths that occur, each with its rows in ascending order."""
    return [(width, [row for row, given in enumerate(row_widths) if given == width]) for width in sorted(set(row_widths))]


def _factors(scales: torch.Tensor, k: int, group_size: int) -> tuple[torch.Tensor, int]:
    """Scales as float32 [N, spans, 1], and the columns of a span: they divide K rounded up to CHUNK."""
    padded = k + -k % CHUNK
    factors = scales.float().unsqueeze(2)
    if group_size == -1:
        return factors, padded
    if padded % group_size == 0:
        return factors, group_size
    return factors.repeat_interleave(group_size // CHUNK, dim=1)[:, : padded // CHUNK], CHUNK


def _levels(codes: torch.Tensor, width: int, rule: SliceRule, bits: int) -> torch.Tensor:
    """Levels of ``core.slicing`` at ``width``.

    Args:
        codes: words as of ``signed_codes``; the top ``bits`` bits of every code are known and the others 0.

    Returns:
        float32 [N * K], this thread's memory: good until the next call.
    """
    half_step = 1 << (PARENT_WIDTH - width) >> 1
    if rule == "round":
        if half_step:
            # Beyond this limit the sum would not fit; the limit itself rounds to the highest slice.
            limited = codes.view(torch.int8).clamp(max=127 - half_step)
            codes = keep_bits(limited.add_(half_step).view(torch.int64), width)
        return _copied(codes)
    if width < bits:
        codes = keep_bits(codes, width)
    # Half a step up from the lower edge of a slice. It is half a unit at 8 bits, which no integer holds.
    straight = _copied(set_bit(codes, half_step.bit_length() - 1)) if half_step else _copied(codes).add_(0.5)
    if rule == "nested":
        return straight
    size = torch.abs(straight, out=_memory_of("size", straight.numel()))
    return straight.addcmul_(straight, size, value=BEND)


def _copied(codes: torch.Tensor) -> torch.Tensor:
    """Words of codes as float32 [N * K]."""
    integers = codes.view(torch.int8).view(-1)
    return _memory_of("levels", integers.numel()).copy_(integers)


def _memory_of(name: str, size: int) -> torch.Tensor:
    """float32 [size], any values: this thread's memory of that name, or new memory if the block is larger than usual."""
    if size > BLOCK_WEIGHTS:
        return torch.empty(size)
    if not hasattr(_memory, name):
        # Made in inference mode, it could not be written to outside of it.
        with torch.inference_mode(False):
            setattr(_memory, name, torch.empty(BLOCK_WEIGHTS))
    memory: torch.Tensor = getattr(_memory, name)
    return memory[:size]


def _multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones here."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


_memory = threading.local()
