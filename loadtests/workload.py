"""What requests a run consists of: when each is due, how long, at which precision, and whether it goes wrong on purpose."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests import arrivals
from loadtests.malformed import FORMS
from loadtests.recorded_trace import read_recorded
from matgptq_vllm.core.errors import InputError

KINDS = ("poisson", "fixed", "bursts", "chat")
"""Traces that are made; anything else is the name of a recorded one's file."""

CHUNK = 16
"""Prompt tokens per hash of the generator's trace format: prompts with equal hashes have equal tokens."""


@dataclass(frozen=True)
class Lengths:
    """Token counts drawn evenly from ``low`` to ``high``, both included."""

    low: int
    high: int

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


@dataclass(frozen=True)
class Planned:
    """One request, before it is sent."""

    due_s: float
    """Seconds from the start of the run."""
    input_tokens: int
    output_tokens: int
    hashes: tuple[int, ...]
    """One per CHUNK prompt tokens."""
    precision: str
    cancel_at: float | None = None
    """Cancelled after this share of the time that requests take; None: not."""
    malformed: str | None = None
    """How it is malformed, a key of FORMS; None: it is not."""

    def trace_line(self) -> str:
        """As the generator's dataset ``timed_trace`` reads it."""
        entry = {
            "timestamp": self.due_s,
            "input_length": self.input_tokens,
            "output_length": self.output_tokens,
            "hash_ids": self.hashes,
        }
        return json.dumps(entry)


@dataclass(frozen=True)
class Workload:
    """All runs of a load test draw their requests from this."""

    trace: str = "poisson"
    seconds: float = 30.0
    """Length of a run with a finite rate; of a recorded trace, as much is replayed."""
    requests: int | None = None
    """Requests of a run with an infinite rate; None: four times the bound on concurrency."""
    input_len: Lengths = field(default_factory=lambda: Lengths(64, 64))
    output_len: Lengths = field(default_factory=lambda: Lengths(32, 32))
    bursts: arrivals.Bursts = field(default_factory=lambda: arrivals.Bursts(factor=5.0, calm_s=20.0, burst_s=10.0))
    prefix_len: int = 128
    """Prompt tokens that all conversations of a chat trace begin with."""
    turns: int = 4
    """Requests per conversation; each repeats those before it."""
    think_s: float = 5.0
    """Mean time between the requests of a conversation."""
    cancel: float = 0.0
    """Share of requests whose client goes away."""
    malformed: float = 0.0
    """Share of requests that a server must refuse."""
    seed: int = 0

    def plan(self, rate: float, concurrency: int, precisions: Sequence[str], run: int, longest: int | None) -> list[Planned]:
        """Requests of one run by the time they are due.

        Args:
            rate: requests per second, inf for all at once; of a recorded trace, its speed: 1 as recorded.
            concurrency: bound on requests in flight.
            precisions: drawn from evenly.
            run: number of the run; no prompt of one run shares tokens with one of another, so caches start cold. Times and
                lengths do not depend on it, so that all precisions get the same load.
            longest: tokens that the model has room for, prompt and answer; longer requests of a recorded trace are cut.

        Raises:
            InputError: the trace is none, or a request is too long for the model.
        """
        chance = random.Random(self.seed)
        made = self._made(rate, concurrency, chance)
        if not made:
            raise InputError(
                f"no request is due within {self.seconds:g} s at rate {rate:g}; give more --seconds or a higher rate"
            )
        planned = []
        for number, (due, prompt, output, hashes) in enumerate(made):
            # A generator of its own per request, so that shares and precisions leave the times alone.
            fate = random.Random(f"{self.seed} {number}")
            precision, draw = fate.choice(list(precisions)), fate.random()
            cancel = fate.random() if draw < self.cancel else None
            form = fate.choice(list(FORMS)) if self.cancel <= draw < self.cancel + self.malformed else None
            prompt, output = _fitted(prompt, output, longest, may_cut=self.trace not in KINDS)
            salted = tuple((run << 40) + value for value in hashes[: math.ceil(prompt / CHUNK)])
            planned.append(Planned(due, prompt, output, salted, precision, cancel, form))
        return planned

    def _made(self, rate: float, concurrency: int, chance: random.Random) -> list[tuple[float, int, int, list[int]]]:
        if self.trace == "chat":
            return self._chat(rate, concurrency, chance)
        if self.trace in KINDS:
            times = self._times(rate, concurrency, chance)
            lengths = [(self.input_len.draw(chance), self.output_len.draw(chance)) for _ in times]
        else:
            recorded = read_recorded(Path(self.trace))
            speed = 1.0 if math.isinf(rate) else rate
            recorded = [one for one in recorded if one.time_s / speed < self.seconds]
            recorded = recorded[: self.requests]
            times = [0.0 if math.isinf(rate) else one.time_s / speed for one in recorded]
            lengths = [(one.input_tokens, one.output_tokens) for one in recorded]
        # Hashes that differ: no prompt shares a prefix with another.
        return [
            (due, prompt, output, [(number << 16) + chunk for chunk in range(math.ceil(prompt / CHUNK))])
            for number, (due, (prompt, output)) in enumerate(zip(times, lengths, strict=True))
        ]

    def _times(self, rate: float, concurrency: int, chance: random.Random) -> list[float]:
        if math.isinf(rate):
            return [0.0] * (self.requests or 4 * concurrency)
        if self.trace == "fixed":
            return arrivals.fixed(rate, self.seconds)
        if self.trace == "bursts":
            return self.bursts.arrivals(rate, self.seconds, chance)
        return arrivals.poisson(rate, self.seconds, chance)

    def _chat(self, rate: float, concurrency: int, chance: random.Random) -> list[tuple[float, int, int, list[int]]]:
        """Conversations that begin with the same tokens; each turn's prompt is all of the turn before and something new."""
        if math.isinf(rate):
            starts = [0.0] * max(1, (self.requests or 4 * concurrency) // self.turns)
        else:
            starts = arrivals.poisson(rate / self.turns, self.seconds, chance)
        made = []
        shared = range(math.ceil(self.prefix_len / CHUNK))
        for conversation, start in enumerate(starts, start=1):
            history, due = list(shared), start
            for _ in range(self.turns):
                output = self.output_len.draw(chance)
                added = math.ceil(self.input_len.draw(chance) / CHUNK)
                history = [*history, *((conversation << 16) + len(history) + chunk for chunk in range(added))]
                made.append((due, len(history) * CHUNK, output, history))
                answer = math.ceil(output / CHUNK)
                history = [*history, *((conversation << 16) + len(history) + chunk for chunk in range(answer))]
                due += 0.0 if math.isinf(rate) else chance.expovariate(1 / self.think_s)
        return sorted(made, key=lambda request: request[0])


def _fitted(prompt: int, output: int, longest: int | None, may_cut: bool) -> tuple[int, int]:
    if longest is None or prompt + output <= longest:
        return prompt, output
    if not may_cut:
        raise InputError(
            f"a request of {prompt} prompt and {output} generated tokens does not fit the model's {longest}; "
            "give a smaller --input-len or --output-len (of a chat: fewer --turns, a smaller --prefix-len)"
        )
    output = min(output, longest // 2)
    return min(prompt, longest - output), output
