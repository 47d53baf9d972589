"""One order in which Triton derives the keys of its cache on disk, in every process.

Triton 3.6 makes a kernel's key from the constants of the functions that it calls, but only of those whose own key is known
already. So the key depends on which kernels the process has launched before, and what one process compiled, another would
not find.
"""

from collections.abc import Sequence
from typing import Any


def derive(kernels: Sequence[Any]) -> None:
    """Have Triton derive the keys of kernels, and so of all that they call, in this order.

    Args:
        kernels: results of ``triton.jit``; where Triton interprets, they have no keys.
    """
    for kernel in kernels:
        getattr(kernel, "cache_key", None)
