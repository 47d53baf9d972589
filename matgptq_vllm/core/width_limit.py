"""WidthLimit: how a replica's present max width reaches the scheduler, in whatever process that is: as a request.

Such a request is in order with all others: what came before is known to the scheduler, what comes after is held to the limit.
It carries a token that only the processes of one engine know, so that no client can write one. Standard library only.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIMIT_KEY = "matgptq_width_limit"
"""Key of a limit in vLLM's ``SamplingParams.extra_args``."""

LIMIT_REACHED = "no request in flight is wider"
"""Stop reason with which the scheduler answers."""


@dataclass(frozen=True)
class WidthLimit:
    """From now on, no request may be wider."""

    max_width: int
    refuses: bool
    """Whether wider requests in flight are ended; otherwise they finish."""

    def to_extra_args(self, token: str) -> dict[str, Any]:
        """The ``extra_args`` of the request that is this limit, for the engine with that token."""
        return {LIMIT_KEY: {"token": token, "max_width": self.max_width, "refuses": self.refuses}}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, token: str | None) -> "WidthLimit | None":
        """The limit in a request's ``extra_args``; None if there is none with the engine's token."""
        given = (extra_args or {}).get(LIMIT_KEY)
        if token is None or not isinstance(given, Mapping):
            return None
        if not hmac.compare_digest(str(given.get("token")).encode(), token.encode()):
            return None
        return cls(int(given["max_width"]), bool(given["refuses"]))
