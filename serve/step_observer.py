"""The engine's steps as the API process sees them: how long each took, and the load it ran under.

vLLM calls its stat loggers once per step, in the event loop of the API process. How late a call comes depends on what else
that loop does, so the time between two calls is a poor clock. A step's duration is therefore taken from the engine's own
clock where it shows: a sequence that got a token in the previous step and in this one has waited exactly one step in
between, and vLLM reports these waits. Their minimum is the step (others may have sat a step out). Only a step in which no
sequence continued is timed by the calls, and only if the engine had something to do since the last one.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from serve.chunk_detector import ChunkDetector

MAX_STEP_S = 30.0
"""Longer is no step: the engine slept or was paused."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One step of one engine."""

    time_s: float
    """When the API process learned of it, on the observer's monotonic clock."""

    engine_index: int

    duration_s: float | None
    """From the end of the engine's previous step to the end of this one; None if the engine may have been idle between."""

    running: int
    """Sequences that the scheduler keeps running after the step; those that ended with it are gone."""

    waiting: int
    """Requests not started, or preempted, after the step."""

    continued: int
    """Sequences that got a token in this step and had one before: the decode part of the batch."""

    started: int
    """Sequences that got their first token."""

    generation_tokens: int

    prompt_tokens: int
    """Prompt tokens computed, prefix-cache hits left out; see ``exact``."""

    kv_cache_usage: float
    """Share of the KV cache's blocks in use after the step, 0 to 1."""

    context_tokens: int | None
    """Estimate of the tokens in flight: used blocks times block size, so up to a block per sequence too many, and a prefix
    that several share counts once. None if the size of the cache is not known."""

    exact: bool = True
    """Whether the tokens are those that took the step's time. A prompt that is computed in chunks over several steps counts
    as a whole in the step of its last chunk, so neither that step nor those before say what was computed. vLLM tells each
    chunk only if it runs with ``--enable-logging-iteration-details``."""


Listener = Callable[[StepRecord], None]


@dataclass(frozen=True)
class EngineLoad:
    """Sums over the engines of this process after their last steps; ``kv_cache_usage`` is that of the fullest."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    context_tokens: int | None = None


class StepObserver:
    """Turns vLLM's statistics into StepRecords for its listeners. For one event loop, not for threads.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last: dict[int, StepRecord] = {}
        self._busy: set[int] = set()
        self._chunks: dict[int, ChunkDetector] = {}
        self._listeners: dict[object, Listener] = {}
        self._failed: set[object] = set()

    @property
    def load(self) -> EngineLoad:
        """The load after the last step. It is not told of requests that a client abandons while the engine empties."""
        last = self._last.values()
        contexts = [record.context_tokens for record in last if record.context_tokens is not None]
        return EngineLoad(
            running=sum(record.running for record in last),
            waiting=sum(record.waiting for record in last),
            kv_cache_usage=max((record.kv_cache_usage for record in last), default=0.0),
            context_tokens=sum(contexts) if contexts else None,
        )

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens: in a vLLM server that is no MatGPTQ replica, nobody does."""
        return bool(self._listeners)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with every step from now on; the result ends that."""
        key = object()
        self._listeners[key] = listener

        def end() -> None:
            self._listeners.pop(key, None)
            self._failed.discard(key)

        return end

    def idle(self) -> None:
        """Nothing is in flight any more: the next step is the first after a pause, and has no duration of its own.

        vLLM reports no step when the last running requests are abandoned, so the middleware has to say it.
        """
        self._busy.clear()
        self._chunks.clear()
        for index, record in self._last.items():
            context = None if record.context_tokens is None else 0
            self._last[index] = replace(record, running=0, waiting=0, kv_cache_usage=0.0, context_tokens=context)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        engine_index: int = 0,
        kv_cache_tokens: int | None = None,
        max_step_tokens: int | None = None,
    ) -> StepRecord | None:
        """Take in what vLLM reports of one step, and tell the listeners.

        vLLM says that its classes may change between releases: an attribute that is missing counts as 0.

        Args:
            scheduler_stats: vLLM's ``SchedulerStats``; None in an API process that is not sent them.
            iteration_stats: vLLM's ``IterationStats``; None for a step that produced no token.
            kv_cache_tokens: how many tokens the engine's KV cache holds, None if unknown.
            max_step_tokens: how many tokens the engine computes in one step at most, None if unknown.

        Returns:
            The step; None if both arguments are None.
        """
        if scheduler_stats is None and iteration_stats is None:
            return None
        now = self._clock()
        last = self._last.get(engine_index)
        if scheduler_stats is not None:
            running = _count(scheduler_stats, "num_running_reqs")
            waiting = _count(scheduler_stats, "num_waiting_reqs") + _count(scheduler_stats, "num_skipped_waiting_reqs")
            usage = max(0.0, float(getattr(scheduler_stats, "kv_cache_usage", None) or 0.0))
        elif last is not None:
            running, waiting, usage = last.running, last.waiting, last.kv_cache_usage
        else:
            running, waiting, usage = 0, 0, 0.0
        gaps = getattr(iteration_stats, "inter_token_latencies_iter", None) or ()
        started = len(getattr(iteration_stats, "time_to_first_tokens_iter", None) or ())
        tokens, exact = _prompt_tokens(scheduler_stats, iteration_stats)
        if not exact:
            finished = len(getattr(iteration_stats, "finished_requests", None) or ())
            chunks = self._chunks.setdefault(engine_index, ChunkDetector())
            seen = chunks.seen(silent=running - (len(gaps) + started - finished) > 0, started=started > 0)
            too_many = max_step_tokens is not None and tokens > max_step_tokens - len(gaps)
            exact = bool(gaps or started) and not seen and not too_many
        record = StepRecord(
            time_s=now,
            engine_index=engine_index,
            duration_s=self._duration(gaps, now, last),
            running=running,
            waiting=waiting,
            continued=len(gaps),
            started=started,
            generation_tokens=_count(iteration_stats, "num_generation_tokens"),
            prompt_tokens=tokens,
            kv_cache_usage=usage,
            context_tokens=None if not kv_cache_tokens else round(usage * kv_cache_tokens),
            exact=exact,
        )
        self._last[engine_index] = record
        if running or waiting:
            self._busy.add(engine_index)
        else:
            self._busy.discard(engine_index)
        self._tell(record)
        return record

    def _duration(self, gaps: Any, now: float, last: StepRecord | None) -> float | None:
        positive = [gap for gap in gaps if gap > 0]
        if positive:
            duration = min(positive)
        elif last is not None and last.engine_index in self._busy:
            duration = now - last.time_s
        else:
            return None
        return duration if 0 < duration <= MAX_STEP_S else None

    def _tell(self, record: StepRecord) -> None:
        for key, listener in tuple(self._listeners.items()):
            try:
                listener(record)
            except Exception:
                # This runs in vLLM's output loop, where an exception would stop the engine. Said once: it may recur each step.
                if key not in self._failed:
                    self._failed.add(key)
                    _logger.exception("A listener to engine steps failed; it is called again, later failures are not logged")


@cache
def step_observer() -> StepObserver:
    """The one of this process: vLLM's statistics write it, the latency model listens."""
    return StepObserver()


def _prompt_tokens(scheduler_stats: Any, iteration_stats: Any) -> tuple[int, bool]:
    """Prompt tokens of a step, and whether that is for certain what it computed."""
    details = getattr(scheduler_stats, "iteration_details", None)
    if details is not None:
        return _count(details, "num_ctx_tokens"), True
    by_source = getattr(iteration_stats, "prompt_token_stats", None)
    if by_source is not None:
        return _count(by_source, "computed"), False
    return _count(iteration_stats, "num_prompt_tokens"), False


def _count(stats: Any, name: str) -> int:
    return max(0, int(getattr(stats, name, None) or 0))
