"""Traces of requests: Poisson arrivals whose rate is multiplied now and then, for a while."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What a trace is drawn from."""

    requests_per_s: float
    """Between bursts."""

    burst_factor: float = 5.0
    """Rate in a burst, over the rate between bursts."""

    calm_s: float = 40.0
    """Mean time between bursts; exponential."""

    burst_s: float = 20.0
    """Mean length of a burst; exponential, but at least a quarter of this."""

    prompt_tokens: int = 200
    """Mean; geometric around half of it."""

    output_tokens: int = 150
    """Mean; geometric above a third of it."""

    same_lengths: bool = False
    """All requests are of the mean lengths."""


@dataclass(frozen=True)
class Arrival:
    """One request."""

    number: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    in_burst: bool


def draw(traffic: Traffic, seconds: float, seed: int) -> list[Arrival]:
    """The requests of ``seconds`` seconds, in order of time. Every trace begins calm."""
    randomness = random.Random(seed)
    arrivals: list[Arrival] = []
    starts, in_burst = 0.0, False
    while starts < seconds:
        mean = traffic.burst_s if in_burst else traffic.calm_s
        lasts = randomness.expovariate(1 / mean) if not in_burst else max(mean / 4, randomness.expovariate(1 / mean))
        rate = traffic.requests_per_s * (traffic.burst_factor if in_burst else 1.0)
        at = starts + randomness.expovariate(rate)
        while at < min(starts + lasts, seconds):
            prompt = _length(randomness, traffic.prompt_tokens, 1.0 if traffic.same_lengths else 0.5)
            output = _length(randomness, traffic.output_tokens, 1.0 if traffic.same_lengths else 1 / 3)
            arrivals.append(Arrival(len(arrivals), at, prompt, output, in_burst))
            at += randomness.expovariate(rate)
        starts, in_burst = starts + lasts, not in_burst
    return arrivals


def _length(randomness: random.Random, mean: int, least: float) -> int:
    return max(2, round(mean * (least + randomness.expovariate(1.0) * (1 - least))))
