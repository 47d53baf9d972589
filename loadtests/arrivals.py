"""When requests arrive: seconds from the start of a run, ascending. Pure functions of a seeded random generator."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile


def fixed(rate: float, seconds: float) -> list[float]:
    """Evenly spaced, ``rate`` per second; at least one."""
    return [number / rate for number in range(max(1, int(rate * seconds)))]


def poisson(rate: float, seconds: float, chance: random.Random) -> list[float]:
    """Independent of each other, ``rate`` per second on average."""

    def times() -> Iterator[float]:
        now = chance.expovariate(rate)
        while True:
            yield now
            now += chance.expovariate(rate)

    return list(takewhile(lambda time: time < seconds, times()))


@dataclass(frozen=True)
class Bursts:
    """Poisson arrivals whose rate is ``factor`` times as high during bursts. Lengths are means, in seconds."""

    factor: float
    calm_s: float
    burst_s: float

    def arrivals(self, rate: float, seconds: float, chance: random.Random) -> list[float]:
        """``rate`` is that between bursts, per second."""
        times: list[float] = []
        now, bursting, turn = 0.0, False, chance.expovariate(1 / self.calm_s)
        while now < seconds:
            gap = chance.expovariate(rate * (self.factor if bursting else 1))
            if now + gap < turn:
                now += gap
                times.append(now)
                continue
            # Poisson arrivals have no memory, so that the gap may be drawn anew at the new rate.
            now, bursting = turn, not bursting
            turn = now + chance.expovariate(1 / (self.burst_s if bursting else self.calm_s))
        return [time for time in times if time < seconds]
