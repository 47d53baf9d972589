"""What a request will see at each profile: its life played forward, with those who come meanwhile.

A request meets the engine as it is when it arrives, but also the requests of the next seconds. So the forecast lets running
sequences end, lets new ones come at the rate of late (``serve.arrivals``), and takes the mean of the predicted step times.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve.arrivals import ArrivalRate
from serve.latency_model import LatencyModel
from serve.load import Load, StepLoad

RATE_LEVEL = 0.85
"""Quantile of the believed arrival rate that forecasts use."""

BUSY_LEVEL = 0.9
"""Share of the remembered requests that came at the rate of bursts or below it."""

PIECES = 6
"""In which a request's life is played."""

FIRST_OUTPUT_TOKENS = 128.0
"""Output tokens that a request is thought to have before any has ended."""

REMEMBERED = 64
"""Requests that the means of prompt and output tokens remember."""

MAX_PROMPT_SHARE = 0.9
"""Share of the engine's time that prompts are thought to take at most."""


@dataclass(frozen=True, slots=True)
class Times:
    """Predicted milliseconds at one profile."""

    tpot: float
    """Per output token of the request."""

    settled: float
    """Per output token, once as many requests end as come, all at this profile."""

    busy: float
    """As ``settled``, at the rate of bursts."""

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
        self._prompts = self._outputs = 0
        self._prompt_tokens = 0.0
        self._output_tokens = FIRST_OUTPUT_TOKENS
        self._square_tokens = 2 * FIRST_OUTPUT_TOKENS**2

    def arrived(self, prompt_tokens: int) -> None:
        """A request arrives now."""
        self._arrivals.arrived()
        self._prompts += 1
        self._prompt_tokens += (prompt_tokens - self._prompt_tokens) / min(self._prompts, REMEMBERED)

    def ended(self, output_tokens: int) -> None:
        """A request has ended."""
        self._outputs += 1
        rate = 1 / min(self._outputs, REMEMBERED)
        tokens = max(1, output_tokens)
        self._output_tokens += rate * (tokens - self._output_tokens)
        self._square_tokens += rate * (tokens**2 - self._square_tokens)

    def times(self, profile: str, load: Load, prompt_tokens: int, more: float = 1.0) -> Times:
        """What a request that arrives now sees if it and all that follow get ``profile``.

        Args:
            load: of the engine, without the request. Those ``following`` go to ``profile`` with it.
            more: factor on the rates of arrivals.
        """
        rate = self._arrivals.quantile(RATE_LEVEL) / 1e3 * more
        busy = max(rate, self._arrivals.busy(BUSY_LEVEL) / 1e3 * more)
        running = {name: float(count) for name, count in load.running.items() if count > 0}
        total = sum(running.values())
        context = load.context_tokens / total if total else self._prompt_tokens + self._output_tokens / 2
        if load.following:
            running = {name: count - load.following.get(name, 0) for name, count in running.items()}
            running[profile] = running.get(profile, 0.0) + sum(load.following.values())
            running = {name: count for name, count in running.items() if count > 0}
        return Times(
            self._tpot(profile, {**running, profile: running.get(profile, 0.0) + load.waiting}, rate, context),
            self._settled((profile,), rate, context),
            self._settled((profile,), busy, context),
            self._ttft(profile, running, load, prompt_tokens),
        )

    def mixed(self, wide: str, narrow: str) -> float:
        """Milliseconds per step while a burst comes in at ``narrow`` and a last request still runs at ``wide``."""
        rate = max(self._arrivals.busy(BUSY_LEVEL), self._arrivals.quantile(RATE_LEVEL)) / 1e3
        return self._settled((narrow, wide), rate, self._prompt_tokens + self._output_tokens / 2)

    def _tpot(self, profile: str, others: dict[str, float], rate: float, context: float) -> float:
        per_piece = self._output_tokens / PIECES
        # Those that run still have, by renewal theory, half of the mean square over the mean to go.
        staying = math.exp(-per_piece * 2 * self._output_tokens / self._square_tokens)
        lengthened = 1 - self._prompt_share(profile, rate)
        elapsed = 0.0
        for _ in range(PIECES):
            tokens = {**others, profile: others[profile] + 1}
            excess = max(1.0, sum(tokens.values()) / self._max_running)
            tokens = {name: count / excess for name, count in tokens.items()}
            step = self._model.step_ms(StepLoad(tokens, {}, context * sum(tokens.values()))) / lengthened
            elapsed += step
            others = {name: count * staying for name, count in others.items()}
            others[profile] += rate * step * per_piece
        return elapsed / PIECES

    def _settled(self, profiles: tuple[str, ...], rate: float, context: float) -> float:
        """Step time where as many sequences end as come, step = fixed + each * (rate * output tokens * step), of requests at
        the first of ``profiles``, with one sequence at each of the others."""
        alone = dict.fromkeys(profiles, 1.0)
        one = self._model.step_ms(StepLoad(alone, {}, context * len(alone)))
        two = self._model.step_ms(StepLoad({**alone, profiles[0]: 2.0}, {}, context * (len(alone) + 1)))
        each = two - one
        lengthened = 1 - self._prompt_share(profiles[0], rate)
        growth = rate * self._output_tokens * each / lengthened
        # Without a bound on sequences, a rate that cannot be kept up with has no settled time.
        full = one + each * (self._max_running - 1) if each > 0 else one
        return (min((one - each) / (1 - growth), full) if growth < 1 else full) / lengthened

    def _prompt_share(self, profile: str, rate: float) -> float:
        """Share of time that the prompts of those who come take: they make the steps of the others longer."""
        return min(rate * self._prompt_tokens * self._model.prompt_token_ms(profile), MAX_PROMPT_SHARE)

    def _ttft(self, profile: str, running: Mapping[str, float], load: Load, prompt_tokens: int) -> float:
        """Until the prompts before it and its own are computed, and, if the engine is full, until it may start."""
        prompts = load.prefill_tokens + prompt_tokens
        steps = math.ceil(prompts / self._max_batched) or 1
        step = self._model.step_ms(StepLoad(running, {profile: prompts / steps}, load.context_tokens))
        total = sum(running.values())
        excess = max(0.0, total + load.waiting + 1 - self._max_running)
        # One of the running ones ends every (output tokens / running) steps.
        return step * (steps + excess * self._output_tokens / max(total, 1.0))
