"""What is in flight in this replica, by profile: the requests that the API process knows, and what the engine's steps say."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from serve.load import Load, StepLoad
from serve.step_observer import StepRecord

FRESH_S = 1.0
"""How long the engine's last word about its queue counts; an idle engine says nothing."""


@dataclass
class _Request:
    profile: str
    prompt_tokens: int
    tokens: float = 0.0
    """Output tokens so far, an equal share of every step's."""


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
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count()
        self._last: StepRecord | None = None
        self._last_at = float("-inf")
        self._listeners: list[Callable[[StepLoad, float], None]] = []

    def begin(self, profile: str, prompt_tokens: int) -> int:
        """A request is passed to the engine; returns the number with which it ends."""
        number = next(self._numbers)
        self._requests[number] = _Request(profile, max(1, prompt_tokens))
        return number

    def end(self, number: int) -> None:
        """The answer to a request is over; a number that is not in flight is ignored."""
        if self._requests.pop(number, None) is not None and not self._requests:
            self._when_idle()

    def on_step(self, listener: Callable[[StepLoad, float], None]) -> None:
        """Call ``listener(load, milliseconds)`` after every step whose duration is known."""
        self._listeners.append(listener)

    def observe(self, record: StepRecord) -> None:
        """Take note of one step of the engine."""
        self._last, self._last_at = record, self._clock()
        running = self._running()
        for request in running:
            request.tokens += record.generation_tokens / len(running)
        if self.paused or record.duration_s is None or not record.exact or not running:
            return
        load = _step_load(record, running)
        for listener in self._listeners:
            listener(load, record.duration_s * 1e3)

    def load(self) -> Load:
        """The present load."""
        running = self._running()
        waiting = list(self._requests.values())[len(running) :]
        return Load(
            running=dict(Counter(request.profile for request in running)),
            waiting=len(waiting),
            prefill_tokens=sum(request.prompt_tokens for request in waiting),
            context_tokens=_context(running),
        )

    def kv_cache_usage(self) -> float | None:
        """Share of the KV cache in use, by the engine's last step; None before the first."""
        return None if self._last is None else self._last.kv_cache_usage

    def _running(self) -> list[_Request]:
        """Requests that the engine computes: all but the latest, as many as it says are waiting."""
        waiting = 0
        if self._last is not None and self._clock() - self._last_at < FRESH_S:
            waiting = self._last.waiting
        requests = list(self._requests.values())
        return requests[: max(len(requests) - waiting, 0)]


def _step_load(record: StepRecord, running: list[_Request]) -> StepLoad:
    """The work of a step. Which requests got tokens is not said; the latest are taken for those that were started."""
    started = running[len(running) - record.started :] if record.started else []
    older = running[: len(running) - record.started] or running
    profiles = Counter(request.profile for request in older)
    share = record.continued / len(older)
    prompts = Counter(request.profile for request in started or running[-1:])
    part = record.prompt_tokens / sum(prompts.values())
    return StepLoad(
        tokens={profile: count * share for profile, count in profiles.items()} if share else {},
        prefill={profile: count * part for profile, count in prompts.items()} if part else {},
        context_tokens=_context(running) if record.context_tokens is None else record.context_tokens,
    )


def _context(requests: list[_Request]) -> int:
    return round(sum(request.prompt_tokens + request.tokens for request in requests))
