"""What chooses the width of each request: a fixed one, the controller, or a plan made beforehand."""

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.simulation.engine import WIDTHS, Engine, Hardware, Served, Step
from loadtests.simulation.trace import Arrival
from serve.budget import Budget
from serve.controller import Controller
from serve.latency_model import LatencyModel
from serve.load import Load, StepLoad
from serve.step_groups import StepGroups

PROFILES = tuple(map(str, WIDTHS))

SWEEP_BATCHES = (1, 8, 32)
SWEEP_STEPS = 8

REVIEW_S = 0.5
"""How often the controller looks at running requests that can follow it."""


class Fixed:
    """Always one width."""

    def __init__(self, width: int) -> None:
        self._index = WIDTHS.index(width)

    def choose(self, arrival: Arrival, engine: Engine) -> tuple[int, object]:
        return self._index, None

    def review(self, now_s: float, engine: Engine) -> int | None:
        """What running requests go to now; None if nothing is to be said."""
        return None

    def step(self, step: Step) -> None:
        pass

    def finished(self, served: Served) -> None:
        pass


class Plan(Fixed):
    """A width for each span of time."""

    def __init__(self, starts_s: Sequence[float], widths: Sequence[int]) -> None:
        self._starts, self._widths = list(starts_s), list(widths)

    def choose(self, arrival: Arrival, engine: Engine) -> tuple[int, object]:
        return self._at(arrival.at_s), None

    def review(self, now_s: float, engine: Engine) -> int | None:
        return self._at(now_s)

    def _at(self, now_s: float) -> int:
        return self._widths[max(0, bisect.bisect_right(self._starts, now_s) - 1)]


class Controlled(Fixed):
    """``serve.controller``, told what a server tells it, after a sweep like a server's at its start.

    Args:
        sweep_lasts: the sweep's steps come one after the other, at the machine's speed of each moment from 0 s on. Else all are
            of the moment 0 s: where that one is slow, everything that the model begins with is too long.
    """

    def __init__(self, hardware: Hardware, budget: Budget, seed: int, elastic: bool = False, sweep_lasts: bool = False) -> None:
        self.model = LatencyModel(PROFILES, WIDTHS)
        self._groups = StepGroups()
        self.now_s = 0.0
        self.budget = budget
        self.elastic = elastic
        self.controller = Controller(
            self.model,
            PROFILES,
            clock=lambda: self.now_s,
            max_running=hardware.max_running,
            max_batched_tokens=hardware.max_batched_tokens,
            elastic=elastic,
        )
        randomness, at_s = random.Random(seed), 0.0
        for batch in SWEEP_BATCHES:
            for index in range(len(WIDTHS)):
                for _ in range(SWEEP_STEPS):
                    decode = [batch if other == index else 0 for other in range(len(WIDTHS))]
                    ms = hardware.step_ms(decode, [0] * len(WIDTHS), 40 * batch, at_s)
                    ms *= randomness.lognormvariate(0, hardware.noise)
                    self._observe(decode, [0] * len(WIDTHS), 40 * batch, ms)
                    if sweep_lasts:
                        at_s += ms / 1e3

    def choose(self, arrival: Arrival, engine: Engine) -> tuple[int, object]:
        self.now_s = arrival.at_s
        decision = self.controller.decide(self.budget, self._load(engine), arrival.prompt_tokens)
        return PROFILES.index(decision.profile), decision

    def review(self, now_s: float, engine: Engine) -> int | None:
        self.now_s = now_s
        self.controller.review(self.budget, self._load(engine))
        profile = self.controller.profile(self.budget)
        return None if profile is None else PROFILES.index(profile)

    def _load(self, engine: Engine) -> Load:
        running = _named(engine.decode)
        return Load(
            running=running,
            waiting=len(engine.queue),
            prefill_tokens=sum(left for _, left in engine.queue),
            context_tokens=engine.context,
            following=running if self.elastic else {},
            lives=[_life(engine, number) for _, number in engine.ends] if self.elastic else (),
        )

    def step(self, step: Step) -> None:
        self._observe(step.decode, step.prefill, step.context, step.ms)

    def finished(self, served: Served) -> None:
        self.now_s = served.finished_s
        arrival = served.arrival
        self.controller.finished(served.decision, arrival.output_tokens, served.tpot_ms, arrival.prompt_tokens)  # type: ignore[arg-type]

    def _observe(self, decode: Sequence[int], prefill: Sequence[int], context: int, ms: float) -> None:
        steps = self._groups.add(StepLoad(_named(decode), _named(prefill), context), ms)
        if steps is not None:
            self.model.observe(*steps)


def _life(engine: Engine, number: int) -> tuple[float, float]:
    """(tokens after the first, milliseconds since the first) of a request that decodes."""
    served = engine.requests[number]
    return engine.steps - served.first_step, (engine.now_s - served.first_s) * 1e3


def _named(counts: Sequence[int]) -> dict[str, int]:
    return {name: count for name, count in zip(PROFILES, counts, strict=True) if count}


@dataclass(frozen=True)
class Run:
    """What a policy made of a trace."""

    requests: list[Served]
    """In order of arrival."""

    admitted: list[int]
    """Index in WIDTHS that each got at first."""

    tokens: list[int]
    """Decoded, for each of WIDTHS."""

    levels: list[tuple[float, int]]
    """(seconds, index in WIDTHS) at every look of the policy: arrivals, and where requests follow also between them."""


def serve(trace: Sequence[Arrival], hardware: Hardware, policy: Fixed, seed: int, elastic: bool = False) -> Run:
    """Every request of ``trace``, served by one engine under ``policy``.

    Args:
        elastic: requests in flight follow the width of the latest.
    """
    engine = Engine(hardware, seed)
    requests, admitted, levels = [], [], []
    looks_s = REVIEW_S
    for arrival in trace:
        while elastic and looks_s < arrival.at_s:
            engine.advance(looks_s, policy.finished, policy.step)
            width = policy.review(looks_s, engine) if engine.requests else None
            if width is not None:
                levels.append((looks_s, width))
                engine.change_all(width)
            looks_s += REVIEW_S
        engine.advance(arrival.at_s, policy.finished, policy.step)
        index, decision = policy.choose(arrival, engine)
        served = Served(arrival, index, decision)
        requests.append(served)
        admitted.append(index)
        levels.append((arrival.at_s, index))
        engine.submit(served)
        if elastic:
            engine.change_all(index)
    while engine.requests:
        engine.advance(engine.now_s + 1.0, policy.finished, policy.step)
    return Run(requests, admitted, engine.tokens, levels)
