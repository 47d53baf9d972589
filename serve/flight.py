"""One request in flight, as the API process knows it."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field


@dataclass(eq=False)
class Flight:
    """What one request has taken so far. Two requests are never equal, however alike."""

    profile: str
    """At which its next tokens are computed."""

    prompt_tokens: int
    follows: Hashable = None
    """The class of budgets with whose level its profile changes while it runs; None if it keeps it."""

    produced: dict[str, float] = field(default_factory=dict)
    """Profile -> output tokens so far: an equal share of every step's, as steps do not say whose tokens theirs were."""

    @property
    def tokens(self) -> float:
        """Output tokens so far, at any profile."""
        return sum(self.produced.values())

    began: tuple[float, float] | None = None
    """What the tracker's clock and its count of tokens per sequence said at its first token; None before."""

    def produce(self, tokens: float) -> None:
        """Take note of output tokens."""
        self.produced[self.profile] = self.produced.get(self.profile, 0.0) + tokens

    def split(self, tokens: int) -> Mapping[str, int]:
        """``tokens``, the engine's count for a sequence of this request, by the profiles at which they were computed."""
        total = self.tokens
        if len(self.produced) < 2 or total <= 0:
            return {next(iter(self.produced), self.profile): tokens}
        parts: dict[str, int] = {}
        seen, before = 0.0, 0
        for profile, produced in self.produced.items():
            seen += produced
            # Rounded sums rather than parts, so that nothing is lost.
            upto = round(tokens * seen / total)
            parts[profile], before = upto - before, upto
        return parts
