"""What a client asks for instead of a precision: budgets in milliseconds, and what to do if they cannot be met.

header                  value                     meaning
X-Latency-Budget-Ms     milliseconds              time per output token after the first, mean over the answer
X-TTFT-Budget-Ms        milliseconds              time to the first token
X-Precision-Policy      strict or best-effort     refuse the request, or compute it at the narrowest precision
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from serve.budget import Budget
from serve.errors import RequestError

LATENCY_HEADER = "X-Latency-Budget-Ms"
TTFT_HEADER = "X-TTFT-Budget-Ms"
POLICY_HEADER = "X-Precision-Policy"

POLICIES = ("strict", "best-effort")

MAX_BUDGET_MS = 1e7
"""Some three hours: whoever means more means no budget."""

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")


@dataclass(frozen=True)
class BudgetRequest:
    """The budgets of one request."""

    budget: Budget | None = None
    """None: the client gave none."""

    strict: bool = False
    """Whether a request whose budget cannot be met is refused."""


def budget_request(headers: Iterable[tuple[bytes, bytes]]) -> BudgetRequest:
    """The budgets among ASGI ``headers``.

    Raises:
        RequestError: 400, a header occurs twice or its value is none that it may have.
    """
    values = list(headers)
    tpot, ttft = _milliseconds(values, LATENCY_HEADER), _milliseconds(values, TTFT_HEADER)
    policy = _single(values, POLICY_HEADER)
    if policy is not None and policy not in POLICIES:
        raise RequestError(f"{POLICY_HEADER} is {policy[:40]!r}; send {' or '.join(POLICIES)}", "budget", param=POLICY_HEADER)
    return BudgetRequest(None if tpot is None and ttft is None else Budget(tpot, ttft), policy == "strict")


def _milliseconds(headers: list[tuple[bytes, bytes]], name: str) -> float | None:
    text = _single(headers, name)
    if text is None:
        return None
    value = float(text) if _NUMBER.fullmatch(text) else 0.0
    if not 0 < value <= MAX_BUDGET_MS:
        raise RequestError(
            f"{name} is {text[:40]!r}; send milliseconds above 0 and at most {MAX_BUDGET_MS:.0f}, such as 30 or 12.5",
            "budget",
            param=name,
        )
    return value


def _single(headers: list[tuple[bytes, bytes]], name: str) -> str | None:
    found = [value for key, value in headers if key.lower() == name.lower().encode()]
    if not found:
        return None
    if len(found) > 1:
        raise RequestError(f"{name} occurs {len(found)} times; send it once", "header", param=name)
    return found[0].decode("latin-1").strip(" \t")
