"""What a plan does to the requests that run and to those that will come: who misses the budget, and how wide their tokens are.

A plan is a profile for now, and another one from some moment on. Its course is played forward: sequences end, others come,
steps take what the latency model says. What counts for a request is its mean time per token over its whole life. So one that
has been fast has time to spend, and one that has been slow can be saved if what is left of it is fast enough. That nobody
knows who will come makes each outcome a probability.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

PIECES_PER_LIFE = 6.0
"""In which a course is played."""

MAX_PIECES = 60
"""A course ends after so many; what is later goes on at the pace of the last one."""

AHEAD_MS = 5e3
"""Requests that come within this time count: as long as a switch up cannot be taken back."""

ARRIVALS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""When the requests come that stand for these, as shares of AHEAD_MS."""

SURE = 1.6
"""A request that may take so many times as long as predicted does not miss."""

MAX_PROMPT_SHARE = 0.9
"""Share of the engine's time that prompts are thought to take at most."""

SPREAD = 0.04
"""Least standard deviation of a predicted pace, as a share of it, if it were known who comes."""

ERROR_FACTOR = 1.6
"""By which the errors that the latency model has measured count: bursts are rarer than what they were measured in, and one
error makes all requests miss that run together."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Milliseconds of a step in which all that can change have one profile: ``alone + each * sequences``."""

    alone: float
    each: float
    prompt: float
    """Of the prompt of one request."""

    bits: float


@dataclass(frozen=True)
class Scene:
    """What all plans of one moment have in common."""

    costs: Sequence[StepCost]
    """By profile, narrow to wide."""

    budget_ms: float
    running: float
    """Sequences that change together, with those that wait or come now."""

    lives: Sequence[tuple[float, float]]
    """(tokens after the first, milliseconds since the first) of those that decode, or of a sample."""

    stands_for: float
    """How many requests each of ``lives`` stands for."""

    left: Sequence[Sequence[float]]
    """Of each: tokens that it may still write, all equally likely."""

    new: Sequence[float]
    """Tokens that a new request may write, all equally likely."""

    mean_tokens: float
    ends_per_step: float
    """Share of the running sequences."""

    prompts_waiting: float
    """As a number of prompts of mean length."""

    max_running: float
    deviations: Sequence[float]
    """By how much of it the predicted time of 1, 2, 4, ... steps in a row is usually wrong; at least one."""


@dataclass(frozen=True)
class Plan:
    """Indices of profiles: ``first`` for ``until_ms``, then ``then``."""

    first: int
    until_ms: float
    then: int


@dataclass(frozen=True)
class Chance:
    """Of what is not known."""

    rate: float
    """Requests that come, per millisecond."""

    noise: float
    """Variance of what they bring, over that of Poisson arrivals."""


@dataclass
class Course:
    """Time over steps, piece by piece."""

    steps: list[float] = field(default_factory=lambda: [0.0])
    times: list[float] = field(default_factory=lambda: [0.0])
    pace: float = 0.0
    """Milliseconds per step after the last piece."""

    tokens: float = 0.0
    """Written within AHEAD_MS."""

    bits: float = 0.0
    """Sum over these."""

    def time_at(self, step: float) -> float:
        """Milliseconds until ``step`` steps are done."""
        return _interpolated(self.steps, self.times, step, self.pace)

    def step_at(self, ms: float) -> float:
        """Steps done after ``ms``."""
        return _interpolated(self.times, self.steps, ms, 1 / self.pace if self.pace > 0 else 0.0)


class Outlook:
    """Judges plans for one scene."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._needs: list[tuple[float, float, float]] = []
        for (tokens, spent_ms), lefts in zip(scene.lives, scene.left, strict=True):
            for left in lefts:
                # The pace that what is left of it must keep, and for how many requests it stands.
                pace = (scene.budget_ms * (tokens + left) - spent_ms) / left
                self._needs.append((left, pace, scene.stands_for / len(lefts)))
        # Those without a token yet have all before them.
        begins = max(0.0, scene.running - scene.stands_for * len(scene.lives))
        self._needs += [(left, scene.budget_ms, begins / len(scene.new)) for left in scene.new if begins > 0]

    def judge(self, plan: Plan, chance: Chance, price: float) -> tuple[float, float]:
        """(mean bits per token less ``price`` bits for every token of a request that misses, pace of one that comes now)."""
        course = self._play(plan, chance.rate)
        scene = self._scene
        # What comes costs what the profile costs that is there for most of the time.
        cost = scene.costs[plan.first if plan.until_ms >= AHEAD_MS else plan.then]
        missed = 0.0
        for left, need, weight in self._needs:
            ms = course.time_at(left)
            if need * left < SURE * ms:
                missed += weight * _exceeds(ms / left, need, self._spread(cost, chance, ms, left, 0.0))
        weight = chance.rate * AHEAD_MS / len(ARRIVALS) / len(scene.new)
        for share in ARRIVALS:
            comes = share * AHEAD_MS
            step = course.step_at(comes)
            for tokens in scene.new:
                ms = course.time_at(step + tokens) - comes
                if scene.budget_ms * tokens < SURE * ms:
                    missed += weight * _exceeds(ms / tokens, scene.budget_ms, self._spread(cost, chance, ms, tokens, comes))
        value = (course.bits - price * scene.mean_tokens * missed) / course.tokens
        return value, sum(course.time_at(tokens) / tokens for tokens in scene.new) / len(scene.new)

    def _play(self, plan: Plan, rate: float) -> Course:
        scene, course = self._scene, Course()
        per_piece = scene.mean_tokens / PIECES_PER_LIFE
        sequences, waiting = scene.running, scene.prompts_waiting
        time = step = beyond = 0.0
        # Until the last that count have written what they may.
        while beyond < max(scene.new) and len(course.steps) <= MAX_PIECES:
            early = time < plan.until_ms
            cost = scene.costs[plan.first if early else plan.then]
            busy = min(rate * cost.prompt, MAX_PROMPT_SHARE)
            pace = (cost.alone + cost.each * min(sequences, scene.max_running)) / (1 - busy)
            count = per_piece
            if early and pace > 0:
                count = min(count, max(1.0, (plan.until_ms - time) / pace))
            lasts = pace * count + waiting * cost.prompt
            waiting = 0.0
            if time < AHEAD_MS and pace > 0:
                course.tokens += sequences * count
                course.bits += sequences * count * cost.bits
            else:
                beyond += count
            time += lasts
            step += count
            course.times.append(time)
            course.steps.append(step)
            sequences = sequences * math.exp(-scene.ends_per_step * count) + rate * lasts
            course.pace = pace
        if not course.tokens:
            course.tokens, course.bits = 1.0, scene.costs[plan.first].bits
        return course

    def _spread(self, cost: StepCost, chance: Chance, ms: float, tokens: float, after_ms: float) -> float:
        """Standard deviation of the pace of one who writes ``tokens`` in ``ms``, from ``after_ms`` on, as a share of it.

        Each request that comes meanwhile slows it down by its prompt and by its part of the steps that are left then, and
        each that came before, from now on, by its part of all steps.
        """
        if ms <= 0:
            return SPREAD
        known = self._scene.deviations
        error = ERROR_FACTOR * known[min(int(tokens).bit_length(), len(known)) - 1]
        most = cost.each * min(tokens, self._scene.mean_tokens)
        meanwhile = chance.rate * ms * (cost.prompt + most / math.sqrt(3)) ** 2
        before = chance.rate * min(after_ms, ms) * most**2 / 2
        return math.sqrt(max(SPREAD, error) ** 2 + chance.noise * (meanwhile + before) / ms**2)


def _exceeds(pace: float, need: float, spread: float) -> float:
    """Probability that the pace, predicted as ``pace``, is above ``need``."""
    if pace <= 0:
        return 0.0
    # The logistic curve next to the normal distribution.
    deviation = 1.7 * (need - pace) / (spread * pace)
    return 1 / (1 + math.exp(min(max(deviation, -20.0), 20.0)))


def _interpolated(places: Sequence[float], values: Sequence[float], place: float, slope: float) -> float:
    """Linear between ``places``, and with ``slope`` beyond them."""
    index = bisect_right(places, place)
    if index == len(places):
        return values[-1] + (place - places[-1]) * slope
    low, high = places[index - 1], places[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (place - low) / (high - low)
