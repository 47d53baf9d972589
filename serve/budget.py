"""What a request or a replica wants of latency."""

import math
from dataclasses import dataclass

from matgptq_vllm.core.errors import InputError

MAX_MS = 1e7
"""Longest time that a budget may name, some three hours: whoever means more means no budget."""


@dataclass(frozen=True)
class Budget:
    """Bounds on the latency of one request; None where it has none."""

    tpot_ms: float | None = None
    """Milliseconds per output token after the first, mean over the request."""

    ttft_ms: float | None = None
    """Milliseconds from arrival to the first output token."""

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            InputError: one is not a number above 0 and at most MAX_MS.
        """
        for name, value in (("time per output token", self.tpot_ms), ("time to first token", self.ttft_ms)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"a budget of {value!r} for the {name} is not a number; give milliseconds, such as 30")
            if not math.isfinite(value) or not 0 < value <= MAX_MS:
                raise InputError(
                    f"a budget of {value!r} ms for the {name} cannot be used; give more than 0 and at most {MAX_MS:.0f} ms"
                )
