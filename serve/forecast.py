"""What a request will see at each profile: its life played forward, with those who come meanwhile.

A request meets the engine as it is when it arrives, but also the requests of the next seconds. So the forecast lets running
sequences end, lets new ones come at the rate of late (``serve.arrivals``), and takes the mean of the predicted step times.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matgptq_vllm.core.precision import FOLLOW_BLOCK
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

    def rates(self, factor: float = 1.0) -> Rates:
        """The rates of arrivals, for the forecasts of one moment; both times ``factor``."""
        now = self._arrivals.quantile(RATE_LEVEL) / 1e3 * factor
        return Rates(now, max(now, self._arrivals.busy(BUSY_LEVEL) / 1e3 * factor))

    def times(self, profile: str, load: Load, prompt_tokens: int, rate: float) -> Times:
        """What a request that arrives now sees if it and all that follow get ``profile``.

        Args:
            load: of the engine, without the request. Those ``following`` go to ``profile`` with it.
            rate: of the requests that come, per millisecond.
        """
        total = float(sum(load.running.values()))
        context = load.context_tokens / total if total else self._context
        moving = {name: float(count) for name, count in load.following.items() if name != profile and count > 0}
        staying = {name: float(count - moving.get(name, 0)) for name, count in load.running.items()}
        running = {name: count for name, count in staying.items() if count > 0} | {
            name: staying.get(name, 0.0) + count for name, count in moving.items()
        }
        staying[profile] = staying.get(profile, 0.0) + load.waiting
        return Times(
            self._tpot(profile, staying, moving, rate, context),
            self._ttft(profile, running, load, prompt_tokens),
        )

    def settled(self, profile: str, rate: float) -> float:
        """Milliseconds per step once as many requests end as come at ``rate`` per millisecond, all at ``profile``."""
        return self._settled((profile,), rate)

    def mixed(self, wide: str, narrow: str, rate: float) -> float:
        """Milliseconds per step while requests come in at ``narrow`` and a last one still runs at ``wide``."""
        return self._settled((narrow, wide), rate)

    @property
    def _context(self) -> float:
        """Tokens that a sequence attends to, on average over its life."""
        return self._prompt_tokens + self._output_tokens / 2

    def _tpot(
        self, profile: str, staying: Mapping[str, float], moving: Mapping[str, float], rate: float, context: float
    ) -> float:
        """Mean step time over a request's life at ``profile``, beside sequences that stay at their profiles and others that
        move to its own, each when its block ends."""
        per_piece = self._output_tokens / PIECES
        # Those that run still have, by renewal theory, half of the mean square over the mean to go.
        kept = math.exp(-per_piece * 2 * self._output_tokens / self._square_tokens)
        lengthened = 1 - self._prompt_share(profile, rate)
        elapsed = came = 0.0
        alive = 1.0
        for piece in range(PIECES):
            unmoved = max(0.0, 1 - (piece + 0.5) * per_piece / FOLLOW_BLOCK) * alive
            tokens = {name: count * alive for name, count in staying.items() if count > 0}
            tokens[profile] = tokens.get(profile, 0.0) + came + 1
            for name, count in moving.items():
                tokens[name] = tokens.get(name, 0.0) + count * unmoved
                tokens[profile] += count * (alive - unmoved)
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
