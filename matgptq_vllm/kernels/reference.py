"""The sliced linear layer in plain torch: right on every device, fast on none. Oracle for the kernels and for ``kernels.cpu``.

Weights exist only while a width is being computed; what stays in memory is the planes.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import SliceRule, bits_read, dequantize


def sliced_linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    row_widths: torch.Tensor,
    widths: Sequence[int],
    layout: PlaneLayout,
    group_size: int,
    rule: SliceRule,
) -> torch.Tensor:
    """x @ W.T, where row m of x meets the weights read at row_widths[m] bits.

    Args:
        x: floating [M, K].
        planes: leading planes of the layer, each uint8 [N, packed K]; enough for the widest of ``widths``.
        scales: floating [N, groups].
        row_widths: int32 [M], on the device of ``x``.
        widths: every value that ``row_widths`` may hold, known on the host.

    Returns:
        [M, N], dtype of x.
    """

    def weights(width: int) -> torch.Tensor:
        num_planes = layout.num_planes(bits_read(width, rule))
        codes = layout.join(planes[:num_planes], x.shape[1])
        return dequantize(codes, scales, width, rule, group_size).to(x.dtype)

    if len(widths) == 1:
        return linear(x, weights(widths[0]))
    y = x.new_empty(x.shape[0], scales.shape[0])
    if x.is_cpu:
        # Only the widths that occur are computed, and only for their rows.
        for width in row_widths.unique().tolist():
            rows = (row_widths == width).nonzero().squeeze(1)
            y[rows] = linear(x[rows], weights(width))
    else:
        # Nothing may be decided on the host here, or a CUDA graph would freeze the decision: every width runs on all rows.
        for width in widths:
            y = torch.where((row_widths == width).unsqueeze(1), linear(x, weights(width)), y)
    return y
