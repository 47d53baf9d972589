"""What is in flight in this replica, by profile: the requests that the API process knows, and what the engine's steps say."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from serve.flight import Flight
from serve.load import Load, StepLoad
from serve.step_groups import Group, StepGroups
from serve.step_observer import StepRecord

UNCLEAR_STEPS = 4
"""Steps after a change of which it is not known whether they came before it: some were under way or on the way here, and a
request whose prompt was being computed changes after it."""

FRESH_S = 1.0
"""How long the engine's last word about its queue counts; an idle engine says nothing."""


class LoadTracker:
    """For one event loop, not for threads.

    Args:
        when_idle: called when the last request in flight has ended.
        clock: monotonic seconds.
    """

    def __init__(self, when_idle: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic):
        self._when_idle = when_idle
        self.paused = False
        """While True, steps are not passed on."""
        self._clock = clock
        self._flights: dict[Flight, None] = {}
        self._unclear = 0
        self._progress = 0.0
        self._last: StepRecord | None = None
        self._last_at = float("-inf")
        self._groups: defaultdict[int, StepGroups] = defaultdict(StepGroups)
        self._listeners: list[Callable[[Sequence[StepLoad], float], None]] = []

    def begin(self, profile: str, prompt_tokens: int, follows: Hashable = None) -> Flight:
        """A request is passed to the engine; returns it, to be ended with ``end``."""
        flight = Flight(profile, max(1, prompt_tokens), follows)
        self._flights[flight] = None
        return flight

    def end(self, flight: Flight) -> None:
        """The answer to a request is over; one that is not in flight is ignored."""
        if flight in self._flights:
            del self._flights[flight]
            if not self._flights:
                self._when_idle()

    def change(self, flights: Iterable[Flight], profile: str) -> None:
        """These requests go to ``profile``: until all surely have, no step teaches anything."""
        for flight in flights:
            flight.profile = profile
        self._unclear = UNCLEAR_STEPS

    def on_step(self, listener: Callable[[Sequence[StepLoad], float], None]) -> None:
        """Call ``listener(loads, milliseconds)`` with every step whose duration is known, or with several in a row of which
        only their sum is (``serve.step_groups``)."""
        self._listeners.append(listener)

    def observe(self, record: StepRecord) -> None:
        """Take note of one step of the engine."""
        self._last, self._last_at = record, self._clock()
        running = self._running()
        for flight in running:
            flight.produce(record.generation_tokens / len(running))
        decoding = record.continued + record.started
        # Equal shares of all in flight would be too few tokens: some have no token yet, others have all theirs.
        self._progress += record.generation_tokens / max(1, decoding)
        # Prompts are computed in order, so the oldest have the tokens.
        for flight in running[:decoding]:
            if flight.began is None:
                flight.began = self._last_at, self._progress
        self._unclear = max(0, self._unclear - 1)
        groups = self._groups[record.engine_index]
        if self.paused or self._unclear or not record.exact or not running:
            groups.drop()
        elif record.duration_s is None:
            self._tell(groups.end())
        else:
            self._tell(groups.add(_step_load(record, running), record.duration_s * 1e3))

    def load(self, follows: Hashable = None) -> Load:
        """The present load; ``following`` in it are the requests that follow the class ``follows``, if given."""
        running = self._running()
        waiting = list(self._flights)[len(running) :]
        followers = [flight for flight in running if follows is not None and flight.follows == follows]
        return Load(
            running=dict(Counter(flight.profile for flight in running)),
            waiting=len(waiting),
            prefill_tokens=sum(flight.prompt_tokens for flight in waiting),
            context_tokens=_context(running),
            following=dict(Counter(flight.profile for flight in followers)),
            lives=tuple(
                (self._progress - flight.began[1], (self._last_at - flight.began[0]) * 1e3)
                for flight in followers
                if flight.began is not None
            ),
        )

    def kv_cache_usage(self) -> float | None:
        """Share of the KV cache in use, by the engine's last step; None before the first."""
        return None if self._last is None else self._last.kv_cache_usage

    def _tell(self, steps: Group | None) -> None:
        if steps is not None:
            for listener in self._listeners:
                listener(*steps)

    def _running(self) -> list[Flight]:
        """Requests that the engine computes: all but the latest, as many as it says are waiting."""
        waiting = 0
        if self._last is not None and self._clock() - self._last_at < FRESH_S:
            waiting = self._last.waiting
        flights = list(self._flights)
        return flights[: max(len(flights) - waiting, 0)]


def _step_load(record: StepRecord, running: list[Flight]) -> StepLoad:
    """The work of a step. Which requests got tokens is not said; the latest are taken for those that were started."""
    started = running[len(running) - record.started :] if record.started else []
    older = running[: len(running) - record.started] or running
    profiles = Counter(flight.profile for flight in older)
    share = record.continued / len(older)
    prompts = Counter(flight.profile for flight in started or running[-1:])
    part = record.prompt_tokens / sum(prompts.values())
    return StepLoad(
        tokens={profile: count * share for profile, count in profiles.items()} if share else {},
        prefill={profile: count * part for profile, count in prompts.items()} if part else {},
        context_tokens=_context(running) if record.context_tokens is None else record.context_tokens,
    )


def _context(flights: list[Flight]) -> int:
    return round(sum(flight.prompt_tokens + flight.tokens for flight in flights))
