"""What a request will see at each profile: its life played forward, with those who come meanwhile.

A request meets the engine as it is when it arrives, but also the requests of the next seconds. So the forecast lets running
sequences end, lets new ones come at the rate of late (``serve.arrivals``), and takes the mean of the predicted step times.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.arrivals import ArrivalRate
from serve.latency_model import LatencyModel
from serve.load import Load, StepLoad
from serve.outlook import MAX_PROMPT_SHARE, Scene, StepCost
from serve.output_lengths import OutputLengths

RATE_LEVEL = 0.85
"""Quantile of the believed arrival rate that forecasts use."""

BUSY_LEVEL = 0.9
"""Share of the remembered requests that came at the rate of bursts or below it."""

PIECES = 6
"""In which a request's life is played."""

MAX_LIVES = 16
"""Running requests that are judged one by one; of more, a sample stands for all."""

REMEMBERED = 64
"""Requests whose prompts a mean remembers."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests per millisecond, as believed at one moment."""

    now: float
    busy: float
    """In bursts."""


@dataclass(frozen=True, slots=True)
class Times:
    """Predicted milliseconds at one profile."""

    tpot: float
    """Per output token of the request."""

    ttft: float


class Forecast:
    """Knows the traffic of late, and predicts from it and the model. For one event loop, not for threads.

    Args:
        clock: monotonic seconds.
        max_running: sequences that the engine runs at most; may be infinite.
        max_batched_tokens: tokens that the engine computes at most in a step.
    """

    def __init__(self, model: LatencyModel, clock: Callable[[], float], max_running: float, max_batched_tokens: int) -> None:
        self._model = model
        self._arrivals = ArrivalRate(clock)
        self._max_running = max_running
        self._max_batched = max_batched_tokens
        self._guessed = _RecentMean()
        self._computed = _RecentMean()
        self._lengths = OutputLengths()

    def arrived(self, prompt_tokens: int) -> None:
        """A request arrives now."""
        self._arrivals.arrived()
        self._guessed.add(prompt_tokens)

    def ended(self, output_tokens: int, prompt_tokens: int | None) -> None:
        """A request has ended.

        Args:
            prompt_tokens: computed for it; None if not known.
        """
        if prompt_tokens is not None:
            self._computed.add(prompt_tokens)
        self._lengths.ended(output_tokens)

    def rates(self, factor: float = 1.0) -> Rates:
        """The rates of arrivals, for the forecasts of one moment; both times ``factor``."""
        now = self._arrivals.quantiles([RATE_LEVEL])[0] / 1e3 * factor
        return Rates(now, max(now, self._arrivals.busy(BUSY_LEVEL) / 1e3 * factor))

    def times(self, profile: str, load: Load, prompt_tokens: int, rate: float) -> Times:
        """What a request that arrives now sees if it and all that follow get ``profile``.

        Args:
            load: of the engine, without the request. Those ``following`` go to ``profile`` with it.
            rate: of the requests that come, per millisecond.
        """
        total = float(sum(load.running.values()))
        context = load.context_tokens / total if total else self._context
        running = _together(load, profile)
        running[profile] += load.waiting
        return Times(self._tpot(profile, running, rate, context), self.ttft(profile, load, prompt_tokens))

    def ttft(self, profile: str, load: Load, prompt_tokens: int) -> float:
        """Milliseconds until the prompts before it and its own are computed, and, if the engine is full, until it may start."""
        running = _together(load, profile)
        factor = self._prompt / self._guessed.value if self._guessed.value else 1.0
        prompts = (load.prefill_tokens + prompt_tokens) * factor
        steps = math.ceil(prompts / self._max_batched) or 1
        step = self._model.step_ms(StepLoad(running, {profile: prompts / steps}, load.context_tokens))
        total = sum(running.values())
        excess = max(0.0, total + load.waiting + 1 - self._max_running)
        # One of the running ones ends every (output tokens / running) steps.
        return step * (steps + excess * self._lengths.mean / max(total, 1.0))

    def scene(self, load: Load, prompt_tokens: int, joins: bool, tpot_ms: float) -> Scene:
        """What plans are judged for: the requests that follow, those that come, and, if one ``joins``, that one.

        Args:
            load: as for ``times``.
            tpot_ms: what their time per token may be.
        """
        total = sum(load.running.values())
        context = load.context_tokens / total if total else self._context
        count = len(load.lives)
        sample = [load.lives[index * count // MAX_LIVES] for index in range(MAX_LIVES)] if count > MAX_LIVES else load.lives
        costs = []
        for profile, bits in zip(self._model.profiles, self._model.bits, strict=True):
            others = _others(load, profile)
            one, two = (
                self._model.step_ms(
                    StepLoad(others | {profile: others[profile] + more}, {}, context * (sum(others.values()) + more))
                )
                for more in (1.0, 2.0)
            )
            prompt = self._model.prompt_ms(profile, self._prompt)
            costs.append(StepCost(2 * one - two, two - one, prompt, bits))
        return Scene(
            costs=costs,
            budget_ms=tpot_ms,
            running=float(sum(load.following.values()) + load.waiting + joins),
            lives=sample,
            stands_for=count / len(sample) if sample else 1.0,
            left=[self._lengths.left(tokens) for tokens, _ in sample],
            new=self._lengths.left(0.0),
            mean_tokens=self._lengths.mean_with([tokens for tokens, _ in sample], count),
            ends_per_step=self._lengths.ends_per_step,
            prompts_waiting=(load.prefill_tokens + prompt_tokens) / (self._guessed.value or 1.0),
            max_running=self._max_running,
            deviations=self._model.deviations(),
        )

    def likely_rates(self, levels: Sequence[float]) -> list[float]:
        """Requests per millisecond at these quantiles of what is believed."""
        return [rate / 1e3 for rate in self._arrivals.quantiles(levels)]

    def settled(self, profile: str, rate: float) -> float:
        """Milliseconds per step once as many requests end as come at ``rate`` per millisecond, all at ``profile``."""
        return self._settled((profile,), rate)

    def mixed(self, wide: str, narrow: str, rate: float) -> float:
        """Milliseconds per step while requests come in at ``narrow`` and a last one still runs at ``wide``."""
        return self._settled((narrow, wide), rate)

    @property
    def _prompt(self) -> float:
        """Prompt tokens that are computed for a request. At arrival they are guessed from its size, and wrong by a factor."""
        return self._computed.value if self._computed.count else self._guessed.value

    @property
    def _context(self) -> float:
        """Tokens that a sequence attends to, on average over its life."""
        return self._prompt + self._lengths.mean / 2

    def _tpot(self, profile: str, running: Mapping[str, float], rate: float, context: float) -> float:
        """Mean step time over a request's life at ``profile``, beside ``running`` sequences as long as these last."""
        per_piece = self._lengths.mean / PIECES
        kept = math.exp(-per_piece * self._lengths.ends_per_step)
        lengthened = 1 - self._prompt_share(profile, rate)
        elapsed = came = 0.0
        alive = 1.0
        for _ in range(PIECES):
            tokens = {name: count * alive for name, count in running.items()}
            tokens[profile] += came + 1
            excess = max(1.0, sum(tokens.values()) / self._max_running)
            tokens = {name: count / excess for name, count in tokens.items()}
            step = self._model.step_ms(StepLoad(tokens, {}, context * sum(tokens.values()))) / lengthened
            elapsed += step
            alive *= kept
            came = came * kept + rate * step * per_piece
        return elapsed / PIECES

    def _settled(self, profiles: tuple[str, ...], rate: float) -> float:
        """Step time where as many sequences end as come, step = fixed + each * (rate * output tokens * step), of requests at
        the first of ``profiles``, with one sequence at each of the others."""
        alone, context = dict.fromkeys(profiles, 1.0), self._context
        one = self._model.step_ms(StepLoad(alone, {}, context * len(alone)))
        two = self._model.step_ms(StepLoad({**alone, profiles[0]: 2.0}, {}, context * (len(alone) + 1)))
        each = two - one
        lengthened = 1 - self._prompt_share(profiles[0], rate)
        growth = rate * self._lengths.mean * each / lengthened
        # Without a bound on sequences, a rate that cannot be kept up with has no settled time.
        full = one + each * (self._max_running - 1) if each > 0 else one
        return (min((one - each) / (1 - growth), full) if growth < 1 else full) / lengthened

    def _prompt_share(self, profile: str, rate: float) -> float:
        """Share of time that the prompts of those who come take: they make the steps of the others longer."""
        return min(rate * self._model.prompt_ms(profile, self._prompt), MAX_PROMPT_SHARE)


@dataclass
class _RecentMean:
    """Mean of what was added, of late."""

    count: int = 0
    value: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, REMEMBERED)


def _others(load: Load, profile: str) -> dict[str, float]:
    """Sequences that keep their profiles, with an entry for ``profile``."""
    found = {name: float(count - load.following.get(name, 0)) for name, count in load.running.items()}
    return {profile: 0.0} | {name: count for name, count in found.items() if count > 0}


def _together(load: Load, profile: str) -> dict[str, float]:
    """Sequences at each profile if all that follow are at ``profile``."""
    found = _others(load, profile)
    found[profile] += sum(load.following.values())
    return found
