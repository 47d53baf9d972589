"""Let matrix products on a GPU round their float32 inputs to TF32, where that is known to be enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Within it, float32 matrix products run on tensor cores: inputs to 10 bits of mantissa, sums in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
