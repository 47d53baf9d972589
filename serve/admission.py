"""From what a request asks for to the profile that it is computed at: tenants, quotas, budgets and the present load.

precision asked for                  profile
a profile, by name                   that one, whatever the load: it is never degraded
auto, or budgets and no precision    the controller's choice for the budgets, or else for the replica's SLO
nothing                              the tenant's default, else the replica's; either may be auto
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matgptq_vllm.core.precision import AUTO, Catalogue
from serve.budget import Budget
from serve.budget_headers import BudgetRequest
from serve.controller import Controller, Decision, class_of
from serve.errors import RequestError
from serve.following import Following, Group
from serve.load import Load
from serve.load_tracker import LoadTracker
from serve.quotas import Quotas, Ticket
from serve.request_details import EndedSequence, RequestDetails
from serve.selection import Selection
from serve.tenants import NotAllowedError, Tenant

UNTOLD_TOKENS = 256
"""Output tokens that a request without max_tokens is expected to take, for quotas."""

MAX_DECISIONS = 100
"""Latest decisions that are remembered, for people to look at."""

RETRY_AFTER_S = 5.0
"""When to try again after a budget could not be met: as long as the controller waits before it steps up."""


@dataclass(frozen=True)
class Size:
    """How large a request is, as far as it can be told before tokenization."""

    prompt_tokens: int
    max_tokens: int | None
    sequences: int = 1


@dataclass(frozen=True)
class Admitted:
    """A request that goes to the engine."""

    selection: Selection
    details: RequestDetails
    finish: Callable[[int], None]
    """To be called once, with the HTTP status, when the answer is over."""

    group: str | None = None
    """Group whose profile the engine lets it follow; None if it keeps its own."""


class Admission:
    """Decides about requests of one replica.

    Args:
        slo: what ``auto`` requests without budgets of their own aim at, None if the replica has none.
        floor: narrowest profile that ``auto`` may choose, None for any.
        default_auto: whether requests that name no precision are ``auto`` requests.
        following: of running requests; None if they keep their profiles.
        quotas: of the tenants.
        order: the profiles, narrow to wide.
        clock: seconds since 1970, for the record of decisions.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        controller: Controller,
        tracker: LoadTracker,
        quotas: Quotas,
        order: Sequence[str],
        slo: Budget | None = None,
        floor: str | None = None,
        default_auto: bool = False,
        following: Following | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self.decisions: deque[dict[str, Any]] = deque(maxlen=MAX_DECISIONS)
        self.on_switch: Callable[[str], None] | None = None
        """Called with "up" or "down" when an ``auto`` request gets another profile than the one before."""
        self.slo = slo
        self.floor = None if floor is None else catalogue.resolve(floor)
        self._catalogue = catalogue
        self._controller = controller
        self._tracker = tracker
        self._quotas = quotas
        self._order = list(order)
        self._default_auto = default_auto
        self._following = following
        self._clock = clock
        self._level: int | None = None

    def hold(self, catalogue: Catalogue) -> None:
        """From now on, admit to these of the profiles only."""
        self._catalogue = catalogue
        if self._following is not None:
            self._following.hold(catalogue.profiles)

    def admit(self, selection: Selection, asked: BudgetRequest, tenant: Tenant | None, size: Size) -> Admitted:
        """The request's profile, and its place in the load.

        Raises:
            RequestError: 403, the tenant may not use the profile; 429, a quota is used up, or the policy is strict and no
                profile is predicted to meet the budgets.
        """
        selection = self._with_default(selection, asked, tenant)
        if selection.reason != AUTO and tenant is not None:
            try:
                tenant.check_allowed(selection.profile)
            except NotAllowedError as error:
                raise RequestError(str(error), "tenant", status=403, param="X-Precision") from None
        # Before anything is decided: what a quota refuses is neither load nor demand.
        bill = None if tenant is None else self._bill(tenant, size)
        decision: Decision | None = None
        group: Group | None = None
        if selection.reason == AUTO:
            try:
                decision, group = self._decide(asked, tenant, size)
            except RequestError as error:
                if bill is not None:
                    bill.finish(error.status)
                raise
            selection = replace(selection, profile=decision.profile, reason=decision.reason)
        else:
            self._controller.arrived(size.prompt_tokens)
        flight = self._tracker.begin(selection.profile, size.prompt_tokens, None if group is None else group.follows)
        if self._following is not None and group is not None:
            self._following.join(group, flight)

        def finish(status: int) -> None:
            self._tracker.end(flight)
            if self._following is not None and group is not None:
                self._following.leave(group, flight)
            if bill is not None:
                bill.finish(status)

        def ended(sequence: EndedSequence) -> None:
            computed = sequence.num_prompt_tokens - sequence.num_cached_tokens
            self._controller.finished(decision, sequence.num_generation_tokens, sequence.tpot_ms, computed)
            if bill is not None:
                bill.add(sequence.num_prompt_tokens + sequence.num_generation_tokens)

        budget = asked.budget or (self.slo if decision is not None else None)
        details = RequestDetails(
            reason=selection.reason,
            tenant=None if tenant is None else tenant.name,
            budget_tpot_ms=None if budget is None else budget.tpot_ms,
            budget_ttft_ms=None if budget is None else budget.ttft_ms,
            predicted_tpot_ms=None if decision is None else decision.predicted_tpot_ms,
            predicted_ttft_ms=None if decision is None else decision.predicted_ttft_ms,
            ended=ended,
            flight=flight,
        )
        return Admitted(selection, details, finish, None if group is None else group.id)

    def _bill(self, tenant: Tenant, size: Size) -> "_Bill":
        """The request's place in the tenant's quotas; RequestError: 429, they are used up."""
        tokens = size.prompt_tokens + size.sequences * (UNTOLD_TOKENS if size.max_tokens is None else size.max_tokens)
        admission = self._quotas.admit(tenant, tokens)
        if admission.ticket is None:
            raise RequestError(
                admission.message or "the quota is used up", "quota", status=429, retry_after_s=admission.retry_after_s
            )
        return _Bill(self._quotas, admission.ticket)

    def _note(self, decision: Decision, load: Load) -> None:
        level = self._order.index(decision.profile)
        if self._level is not None and level != self._level and self.on_switch is not None:
            self.on_switch("up" if level > self._level else "down")
        self._level = level
        self.decisions.append(
            {
                "time": round(self._clock(), 3),
                "precision": decision.profile,
                "reason": decision.reason,
                "predicted_tpot_ms": decision.predicted_tpot_ms,
                "budget_tpot_ms": None if decision.budget is None else decision.budget.tpot_ms,
                "running": sum(load.running.values()),
            }
        )

    def _with_default(self, selection: Selection, asked: BudgetRequest, tenant: Tenant | None) -> Selection:
        """``selection``, if the request named no precision with what stands for that."""
        if selection.reason != "default":
            return selection
        default = None if tenant is None else tenant.default
        if asked.budget is not None or default == AUTO or (default is None and self._default_auto):
            return replace(selection, reason=AUTO)
        if default is not None:
            held = default if default in self._catalogue.profiles else self._catalogue.default
            return replace(selection, profile=held, reason="tenant")
        return selection

    def _decide(self, asked: BudgetRequest, tenant: Tenant | None, size: Size) -> tuple[Decision, Group | None]:
        """(what an ``auto`` request gets, the group with which it changes)."""
        allowed = self._allowed(tenant)
        floor = self._floor(tenant)
        budget = asked.budget or self.slo
        if budget is None:
            # Nothing to aim at: the default, unless the tenant may not use it.
            default = self._catalogue.default
            self._controller.arrived(size.prompt_tokens)
            decision = Decision(default if default in allowed else allowed[-1], AUTO, None, None, True)
            self._note(decision, self._tracker.load())
            return decision, None
        load = self._tracker.load(None if self._following is None else class_of(budget))
        decision = self._controller.decide(budget, load, size.prompt_tokens, floor, allowed)
        if asked.strict and not decision.meets:
            raise RequestError(
                f"no precision is predicted to meet the budget: at {decision.profile}, the best of those allowed, a token is "
                f"expected to take {_shown(decision.predicted_tpot_ms)} and the first {_shown(decision.predicted_ttft_ms)}; "
                "try again later, ask for more, or leave X-Precision-Policy: strict out",
                "budget_unmet",
                status=429,
                retry_after_s=RETRY_AFTER_S,
            )
        self._note(decision, load)
        group = None
        if self._following is not None:
            group = self._following.group(budget, floor, allowed, decision.profile)
        return decision, group

    def _allowed(self, tenant: Tenant | None) -> list[str]:
        """Profiles that a tenant may use now, narrow to wide; RequestError if there is none."""
        held = [profile for profile in self._order if profile in self._catalogue.profiles]
        allowed = [profile for profile in held if tenant is None or tenant.allowed is None or profile in tenant.allowed]
        if not allowed:
            raise RequestError(
                f"none of the precisions of this key is held now; held are {', '.join(held)}", "tenant", status=403
            )
        return allowed

    def _floor(self, tenant: Tenant | None) -> str | None:
        """The wider one of the replica's and the tenant's floor."""
        floors = [floor for floor in (self.floor, None if tenant is None else tenant.floor) if floor is not None]
        return max(floors, key=self._order.index, default=None)


class _Bill:
    """Settles what a request reserved of a quota with what the engine says that its sequences took."""

    def __init__(self, quotas: Quotas, ticket: Ticket):
        self._quotas = quotas
        self._ticket = ticket
        self._tokens = 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def finish(self, status: int) -> None:
        # The engine's word about the last sequence may come after the answer is over; then the reservation stands. About a
        # request that it refused, it says nothing.
        used = self._tokens or (0 if 400 <= status < 499 else None)
        self._quotas.settle(self._ticket, used)


def _shown(milliseconds: float | None) -> str:
    return "an unknown time" if milliseconds is None else f"{milliseconds:.1f} ms"
