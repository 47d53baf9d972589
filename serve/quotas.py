"""Quotas: whether a request of a tenant is admitted now, and if not, how long until it would be.

Every limit per minute is a token bucket: it holds at most one minute's worth, starts full and is refilled evenly. In any
``t`` seconds it therefore lets through at most ``limit * (1 + t / 60)``. Tokens are reserved when a request is admitted
and settled when it ends. One that used more than it reserved leaves a debt, which is paid off before anything else is
admitted. For one event loop, not for threads; each API process counts for itself.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.tenants import Tenant, Tenants

REFUSALS = ("requests", "tokens", "concurrency", "too_large")
"""Which limit refused a request: the values of a metric label, so the list is closed."""

CONCURRENCY_RETRY_S = 1.0
"""Wait that is proposed when too many requests are in flight: when one of them ends cannot be known."""


class TokenBucket:
    """Holds at most ``per_minute`` units and gains as many in a minute; starts full.

    Times are seconds of one clock; one that is earlier than another before it counts as that one.
    """

    def __init__(self, per_minute: int, now: float):
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Units that can be taken; negative: the debt that has to be paid off first."""
        elapsed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._level = min(float(self.per_minute), self._level + elapsed * self.per_minute / 60)
        return self._level

    def wait_s(self, amount: int, now: float) -> float | None:
        """Seconds until ``amount`` can be taken, 0 if it can be now; None: never, it is more than the bucket holds."""
        if amount > self.per_minute:
            return None
        missing = amount - self.level(now)
        # Up to the next millisecond but one: after that wait, rounding cannot refuse what was promised.
        return 0.0 if missing <= 0 else math.ceil(missing * 60_000 / self.per_minute + 1) / 1000

    def charge(self, amount: int, now: float) -> None:
        """Take ``amount``, into debt if need be; give back if it is negative, of which ``level`` keeps what fits."""
        self._level = self.level(now) - amount

    def resize(self, per_minute: int, now: float) -> None:
        """Change the limit; the time until the bucket is full stays what it is."""
        self._level = self.level(now) * per_minute / self.per_minute
        self.per_minute = per_minute


class _Account:
    """What one tenant has used; survives changes of its limits."""

    def __init__(self) -> None:
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.in_flight = 0

    def apply(self, tenant: Tenant, now: float) -> None:
        self.requests = _resized(self.requests, tenant.requests_per_minute, now)
        self.tokens = _resized(self.tokens, tenant.tokens_per_minute, now)


class Ticket:
    """One admitted request; given back to ``Quotas.settle`` when it ends."""

    __slots__ = ("account", "bucket", "reserved", "settled")

    def __init__(self, account: _Account, reserved: int):
        self.account = account
        # The bucket that was charged: a limit may appear, or go, while the request runs.
        self.bucket = account.tokens
        self.reserved = reserved
        self.settled = False


@dataclass(frozen=True)
class Admission:
    """Whether a request is admitted."""

    allowed: bool
    ticket: Ticket | None = None
    """To settle when the request ends, however it ends; None if it is refused."""

    reason: str | None = None
    """One of REFUSALS if it is refused: the limit that takes longest."""

    retry_after_s: float | None = None
    """Seconds after which it would be admitted if nothing else came. None: it is admitted, or never would be."""

    message: str | None = None
    """For the client, if it is refused."""


class Quotas:
    """The accounts of all tenants.

    Args:
        tenants: the tenants in force; accounts of others are dropped when they change, so that memory is bounded.
        clock: seconds that never run backwards.
    """

    def __init__(self, tenants: Callable[[], Tenants], clock: Callable[[], float] = time.monotonic):
        self._tenants = tenants
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._pruned_for: Tenants | None = None

    def __len__(self) -> int:
        return len(self._accounts)

    def admit(self, tenant: Tenant, estimated_tokens: int) -> Admission:
        """Admit or refuse a request; a refused one uses up nothing.

        Args:
            estimated_tokens: prompt tokens as estimated, plus ``max_tokens`` (for every sample) where the request has it.
                A negative number counts as none: vLLM refuses what it came from.
        """
        estimated_tokens = max(0, estimated_tokens)
        now = self._clock()
        account = self._account(tenant, now)
        refusals = []
        if account.tokens is not None:
            wait = account.tokens.wait_s(estimated_tokens, now)
            if wait is None:
                return _too_large(tenant, estimated_tokens)
            refusals.append((wait, "tokens", f"this API key's {tenant.tokens_per_minute} tokens per minute are used up"))
        if account.requests is not None:
            wait = account.requests.wait_s(1, now) or 0.0
            refusals.append((wait, "requests", f"this API key's {tenant.requests_per_minute} requests per minute are used up"))
        if tenant.max_concurrent is not None and account.in_flight >= tenant.max_concurrent:
            what = f"this API key has {account.in_flight} requests in flight, and may have {tenant.max_concurrent}"
            refusals.append((CONCURRENCY_RETRY_S, "concurrency", what))
        wait, reason, what = max(refusals, default=(0.0, "", ""))
        if wait > 0:
            return Admission(False, None, reason, wait, f"{what}; retry in {math.ceil(wait)} s")
        if account.tokens is not None:
            account.tokens.charge(estimated_tokens, now)
        if account.requests is not None:
            account.requests.charge(1, now)
        account.in_flight += 1
        return Admission(True, Ticket(account, estimated_tokens))

    def settle(self, ticket: Ticket, used_tokens: int | None) -> None:
        """The request of ``ticket`` has ended; a second call for it changes nothing.

        Args:
            used_tokens: prompt and generated tokens that were really computed. None: not known, so what was reserved.
        """
        if ticket.settled:
            return
        ticket.settled = True
        ticket.account.in_flight -= 1
        if ticket.bucket is not None and used_tokens is not None:
            ticket.bucket.charge(max(0, used_tokens) - ticket.reserved, self._clock())

    def _account(self, tenant: Tenant, now: float) -> _Account:
        tenants = self._tenants()
        if tenants is not self._pruned_for:
            self._accounts = {name: account for name, account in self._accounts.items() if tenants.get(name) is not None}
            self._pruned_for = tenants
        account = self._accounts.setdefault(tenant.name, _Account())
        account.apply(tenant, now)
        return account


def _resized(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    if bucket.per_minute != per_minute:
        bucket.resize(per_minute, now)
    return bucket


def _too_large(tenant: Tenant, estimated_tokens: int) -> Admission:
    # A number of any length may come from a request body.
    shown = estimated_tokens if estimated_tokens < 10**12 else "more than 10^12"
    return Admission(
        False,
        reason="too_large",
        message=f"the request may use {shown} tokens (prompt and max_tokens), and this API key has "
        f"{tenant.tokens_per_minute} per minute; lower max_tokens or shorten the prompt",
    )
