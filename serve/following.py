"""Running ``auto`` requests follow the level of their class: what the workers have to be told, and when.

Requests whose profile would always be the same (budgets of one class, one floor, the same allowed profiles) form a group,
whose id travels with each of them to the engine (``matgptq_vllm.core.precision.GROUP_KEY``). When the controller gives a
group another profile, the workers are told group and profile, and its requests change with the next step.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from serve.budget import Budget
from serve.controller import BudgetClass, Controller, class_of
from serve.flight import Flight
from serve.load_tracker import LoadTracker

FOLLOW_RPC = "matgptq_follow"
"""Name of the worker method that is told the profiles of groups."""

PERIOD_S = 0.5
"""How often the load is looked at while requests run that could follow it."""

MAX_GROUPS = 256
"""Groups without requests are kept, for the next one, up to so many."""

MAX_REVIEWS = 16
"""Classes looked at in one period: each takes the time of one decision."""

Levels = Mapping[str, str | None]
Send = Callable[[Levels], Awaitable[object]]

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Group:
    """Requests that change together."""

    id: str
    budget: Budget
    floor: str | None
    allowed: Collection[str] | None
    profile: str
    """The last one that the workers were told, or that its first request was admitted at."""

    flights: set[Flight]

    @property
    def follows(self) -> BudgetClass:
        """The class of its budget."""
        return class_of(self.budget)


class Following:
    """The groups of one API process. For one event loop, not for threads.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, controller: Controller, tracker: LoadTracker, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._controller = controller
        self._tracker = tracker
        # Other API processes of the server have groups of their own.
        self._prefix = uuid.uuid4().hex[:12]
        self._count = 0
        self._groups: dict[tuple[object, ...], Group] = {}
        self._dropped: list[str] = []
        self._held: Collection[str] = controller.profiles
        self._wake = asyncio.Event()
        self._reviewed = 0

    def group(self, budget: Budget, floor: str | None, allowed: Collection[str], profile: str) -> Group:
        """The group of a request that is admitted at ``profile`` now."""
        key = (class_of(budget), floor, tuple(allowed))
        found = self._groups.pop(key, None)
        if found is None:
            self._count += 1
            found = Group(f"{self._prefix}.{self._count}", budget, floor, allowed, profile, set())
        self._groups[key] = found
        self._drop()
        return found

    def hold(self, profiles: Collection[str]) -> None:
        """From now on, groups get no others than these of the controller's profiles."""
        self._held = profiles
        self._wake.set()

    def join(self, group: Group, flight: Flight) -> None:
        """``flight`` runs from now on."""
        group.flights.add(flight)
        self._wake.set()

    def leave(self, group: Group, flight: Flight) -> None:
        """``flight`` has ended."""
        group.flights.discard(flight)

    def changes(self) -> Levels:
        """What the workers do not know yet: the present profile of groups, None for those that are no more."""
        found: dict[str, str | None] = dict.fromkeys(self._dropped)
        for group in self._groups.values():
            allowed = [name for name in self._held if group.allowed is None or name in group.allowed]
            # Without any, the group was admitted at profiles that are held no more: it ends as it is.
            profile = self._controller.profile(group.budget, group.floor, allowed) if allowed else None
            if group.flights and profile is not None and profile != group.profile:
                found[group.id] = profile
        return found

    def told(self, levels: Levels) -> None:
        """The workers know ``levels`` now."""
        self._dropped = [name for name in self._dropped if name not in levels]
        for group in self._groups.values():
            profile = levels.get(group.id)
            if profile is not None:
                group.profile = profile
                self._tracker.change(group.flights, profile)

    def review(self) -> None:
        """Let the controller look at the load again, for each class that has requests running."""
        running = {group.follows: group for group in self._groups.values() if group.flights}
        groups = list(running.values())
        # In turn, so that no number of classes holds the event loop.
        for offset in range(min(len(groups), MAX_REVIEWS)):
            group = groups[(self._reviewed + offset) % len(groups)]
            self._controller.review(group.budget, self._tracker.load(group.follows))
        self._reviewed += MAX_REVIEWS

    async def run(self, send: Send) -> None:
        """Tell the workers of changes, as long as the server runs.

        Args:
            send: passes profiles by group on to all workers.
        """
        failed = False
        due = self._clock()
        while True:
            running = any(group.flights for group in self._groups.values())
            try:
                await asyncio.wait_for(self._wake.wait(), max(0.0, due - self._clock()) if running else None)
                self._wake.clear()
            except asyncio.TimeoutError:  # a class of its own before Python 3.11
                pass
            if self._clock() >= due:
                self.review()
                due = self._clock() + PERIOD_S
            levels = self.changes()
            if not levels:
                continue
            try:
                await send(levels)
            except Exception:
                # Requests then stay at their profiles, and the next period tries again. Said once: it may recur.
                if not failed:
                    _logger.exception("Running requests could not be given another precision; later failures are not logged")
                failed = True
                await asyncio.sleep(PERIOD_S)
            else:
                self.told(levels)

    def _drop(self) -> None:
        """Forget the oldest groups without requests, if there are too many."""
        excess = len(self._groups) - MAX_GROUPS
        empty = [key for key, group in self._groups.items() if not group.flights] if excess > 0 else []
        # The newest is the one that a request is about to join.
        for key in [key for key in empty if key != next(reversed(self._groups))][:excess]:
            self._dropped.append(self._groups.pop(key).id)
