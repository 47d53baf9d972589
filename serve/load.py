"""What an engine is doing: the whole of it at one moment, and the work of one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Load:
    """An engine at one moment."""

    running: Mapping[str, int] = field(default_factory=dict)
    """Profile -> sequences that the engine has started and not finished."""

    waiting: int = 0
    """Requests that the engine has not started."""

    prefill_tokens: int = 0
    """Prompt tokens not yet computed, over all requests that are waiting or started."""

    context_tokens: int = 0
    """Tokens whose keys and values running sequences attend to."""

    following: Mapping[str, int] = field(default_factory=dict)
    """Those of ``running`` that would go to another profile with the request that is looked at."""

    lives: Sequence[tuple[float, float]] = ()
    """(output tokens after the first, milliseconds since the first) of each of ``following`` that decodes."""


@dataclass(frozen=True)
class StepLoad:
    """The work of one engine step. Predictions take fractions too: the mean of several steps."""

    tokens: Mapping[str, float] = field(default_factory=dict)
    """Profile -> sequences that decode one token."""

    prefill: Mapping[str, float] = field(default_factory=dict)
    """Profile -> prompt tokens computed."""

    context_tokens: float = 0.0
    """Tokens that the step's sequences attend to."""
