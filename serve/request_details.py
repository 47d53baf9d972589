"""What was decided for one request at admission, kept until the engine reports how the request went."""

from collections.abc import Callable
from dataclasses import dataclass

from serve.flight import Flight


@dataclass(frozen=True)
class EndedSequence:
    """What one finished sequence took."""

    num_prompt_tokens: int
    num_generation_tokens: int
    tpot_ms: float | None
    """Time per output token after the first; None if there was none."""

    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""


@dataclass(frozen=True)
class RequestDetails:
    """Rides along with the request's precision in ``RequestPrecisions``. All times in milliseconds; None: there is none."""

    reason: str
    """Why the request got its precision, one of ``selection.REASONS``."""

    tenant: str | None = None
    """Name in the tenant file; None if the server has no tenants."""

    budget_tpot_ms: float | None = None
    """Asked for: time per output token after the first."""

    budget_ttft_ms: float | None = None
    """Asked for: time to the first token."""

    predicted_tpot_ms: float | None = None
    predicted_ttft_ms: float | None = None

    flight: Flight | None = None
    """The request in flight, and after it what it took; None if that is not followed."""

    ended: Callable[[EndedSequence], None] | None = None
    """Called once per finished sequence. Sequences that a client abandons never finish."""
