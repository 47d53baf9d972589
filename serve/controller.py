"""Which profile an ``auto`` request gets: the widest that is predicted to meet its budget.

A request keeps its profile to its end, so what it will see counts, not only the present: for each profile the controller
plays the request's life forward. Running sequences finish, new ones come at the rate of late (``ArrivalRate``) and get
that same profile; the mean of the predicted step times is the time per output token.

Hysteresis, for each class of budgets (budgets within 2%):

    down    at once, to the widest profile that fits, but not within HOLD_S after a switch up
    up      to the widest profile that at every decision of the last HOLD_S was predicted to fit with UP_MARGIN to spare,
            but not within HOLD_S after a switch down

So between two switches of one class in opposite directions there are at least HOLD_S. Pure: the clock is an argument.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from matgptq_vllm.core.errors import InputError
from serve.arrivals import ArrivalRate
from serve.budget import Budget
from serve.latency_model import LatencyModel
from serve.load import Load, StepLoad

HOLD_S = 5.0
"""Least time between switches of one class in opposite directions."""

PATIENCE_S = 10.0
"""How long a step up waits for the widest profile that fits to have done so for HOLD_S, before a narrower one is taken."""

UP_HEADROOM = 1.15
"""A wider profile must fit even if so many times as many requests come."""

BOLD_RATE = 0.01
MISSES = 0.03
BOLDNESS = (0.5, 2.0)
MARGIN_RATE = 0.005
MARGINS = (0.02, 0.6)
MARGIN = 0.1
"""How far below a budget predictions must stay, as a share of them."""

BUSY_LEVEL = 0.9
"""Share of the requests that come at the rate of bursts or below it."""

RATE_LEVEL = 0.85
"""Quantile of the believed arrival rate that predictions use."""

LOOK_AHEAD = 6
"""Pieces in which a request's life is played forward."""

MAX_PROMPT_SHARE = 0.9
"""Share of the engine's time that prompts are thought to take at most."""

FIRST_OUTPUT_TOKENS = 128.0
"""Output tokens that a request is thought to have before any has finished."""

REMEMBERED = 64
"""Requests that the means of prompt and output tokens remember."""

GRID = {"tpot": (0.05, 1.02, 701), "ttft": (1.0, 1.2, 65)}
"""Of each bound: first value in ms, ratio, and how many: budgets are rounded down to this grid, so that the classes are
few, whatever clients send."""


@dataclass(frozen=True)
class Decision:
    """What one request gets."""

    profile: str
    reason: str
    """``budget``: predicted to meet the budget; ``best-effort``: not; ``auto``: there is none."""

    predicted_tpot_ms: float | None
    """Without margin; None while nothing is known."""

    predicted_ttft_ms: float | None
    budget_tpot_ms: float | None = None
    meets: bool = True
    """Whether both bounds are predicted to be met."""


@dataclass(frozen=True, slots=True)
class _Times:
    """Predicted milliseconds at one profile."""

    tpot: float
    """Per output token of the request."""

    settled: float
    """Per output token, once the engine has settled at the present rate with this profile alone."""

    busy: float
    """As ``settled``, at the rate of bursts."""

    ttft: float


@dataclass(slots=True)
class _Class:
    """State of the requests with one budget."""

    level: int
    """Index of the widest profile that they get."""

    up_at: float
    """Time of the last switch up."""

    down_at: float
    fits_since: list[float]
    """Of each profile: since when every decision found that it fits with UP_MARGIN; infinity if the last one did not."""


class Controller:
    """Chooses profiles. Not thread-safe: one event loop owns it.

    Args:
        model: of the same profiles.
        profiles: narrow to wide.
        floor: narrowest profile that it chooses, None for any.
        slo: the budget of requests that bring none, None if there is none.
        clock: monotonic seconds.
        max_running: sequences that the engine runs at most, None for no bound.
        max_batched_tokens: tokens that the engine computes at most in a step.
        elastic: running ``auto`` requests follow their class's profile, so that a switch does not leave mixed batches.
    """

    def __init__(
        self,
        model: LatencyModel,
        profiles: Sequence[str],
        floor: str | None = None,
        slo: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_running: int | None = None,
        max_batched_tokens: int = 2048,
        elastic: bool = False,
    ) -> None:
        if tuple(profiles) != model.profiles:
            raise InputError(f"the controller's profiles {list(profiles)} are not the model's, {list(model.profiles)}")
        self.profiles = tuple(profiles)
        self._model = model
        self._index = {name: index for index, name in enumerate(self.profiles)}
        self._floor = 0 if floor is None else self._position(floor)
        self._slo = slo
        self._clock = clock
        self._max_running = math.inf if max_running is None else max(1, max_running)
        self._max_batched = max(1, max_batched_tokens)
        self._elastic = elastic
        self._arrivals = ArrivalRate(clock)
        self._classes: dict[tuple[int | None, int | None], _Class] = {}
        self._output_tokens = FIRST_OUTPUT_TOKENS
        self._square_output_tokens = 2 * FIRST_OUTPUT_TOKENS**2
        self._prompt_tokens = 0.0
        self._num_prompts = 0
        self._num_outputs = 0
        self._headroom = 1.0
        self._boldness = 1.0
        self._margin = MARGIN

    @property
    def margin(self) -> float:
        """Learned part of the safety margin: predictions must stay so far below a budget, as a share of them."""
        return self._headroom

    def decide(
        self,
        budget: Budget | None,
        load: Load,
        prompt_tokens: int,
        floor: str | None = None,
        allowed: Collection[str] | None = None,
    ) -> Decision:
        """The profile of an ``auto`` request that arrives now.

        Args:
            budget: of the request; None for the replica's SLO.
            load: of the engine, without this request.
            floor: narrowest profile for this request, if that is wider than the replica's.
            allowed: the profiles that it may get, None for all. Where all are below the floor, it gets the widest of them.

        Raises:
            InputError: ``allowed`` names no profile of this replica, or ``floor`` is none of them.
        """
        self.arrived(prompt_tokens)
        budget = self._slo if budget is None else budget
        choices = self._choices(floor, allowed)
        if budget is None or (budget.tpot_ms is None and budget.ttft_ms is None):
            return Decision(self.profiles[choices[-1]], "auto", None, None)
        key, budget = _class_of(budget)
        predicted = [self._predict(index, load, prompt_tokens) for index in range(len(self.profiles))]
        roomier = [self._predict(index, load, prompt_tokens, UP_HEADROOM) for index in range(len(self.profiles))]
        state = self._switch(key, budget, predicted, roomier)
        chosen = max((index for index in choices if index <= state.level), default=choices[0])
        tpot, ttft = predicted[chosen].tpot, predicted[chosen].ttft
        known = self._model.num_observations > 0
        meets = _within(tpot, budget.tpot_ms, 1.0) and _within(ttft, budget.ttft_ms, 1.0)
        reason = "budget" if meets else "best-effort"
        return Decision(self.profiles[chosen], reason, tpot if known else None, ttft if known else None, budget.tpot_ms, meets)

    def arrived(self, prompt_tokens: int) -> None:
        """Take note of a request that arrives now. ``decide`` does it for its own; call it for requests that name their
        precision, which are load too."""
        self._arrivals.arrived()
        self._num_prompts += 1
        self._prompt_tokens += (prompt_tokens - self._prompt_tokens) / min(self._num_prompts, REMEMBERED)

    def finished(self, decision: Decision | None, output_tokens: int, tpot_ms: float | None) -> None:
        """Learn from a request that ended by itself.

        Args:
            decision: what ``decide`` said of it; None if its precision was named.
            tpot_ms: measured time per output token after the first; None if there was none.
        """
        self._num_outputs += 1
        self._output_tokens += (max(1, output_tokens) - self._output_tokens) / min(self._num_outputs, REMEMBERED)
        self._square_output_tokens += (max(1, output_tokens) ** 2 - self._square_output_tokens) / min(
            self._num_outputs, REMEMBERED
        )
        if decision is None or tpot_ms is None or not decision.predicted_tpot_ms:
            return
        missed = decision.budget_tpot_ms is not None and tpot_ms > decision.budget_tpot_ms
        self._margin = min(max(self._margin + MARGIN_RATE * (missed - MISSES), MARGINS[0]), MARGINS[1])
        self._boldness = min(max(self._boldness + BOLD_RATE * (MISSES - missed), BOLDNESS[0]), BOLDNESS[1])

    def _target(self, budget: Budget, predicted: Sequence[_Times], margin: float) -> int:
        """Index of the profile for now; hysteresis aside."""
        settles = [
            i
            for i, t in enumerate(predicted)
            if (self._elastic or _within(t.settled, budget.tpot_ms, margin)) and _within(t.ttft, budget.ttft_ms, margin)
        ]
        lasts = [i for i in settles if _within(predicted[i].busy, budget.tpot_ms, margin)]
        safe = max(lasts, default=0)
        fits = [
            i
            for i in settles
            if _within(predicted[i].tpot, budget.tpot_ms, margin)
            and (self._elastic or i <= safe or budget.tpot_ms is None or self._mixed(i, safe) <= budget.tpot_ms * self._boldness)
        ]
        return max(fits, default=max(lasts, default=max(settles, default=0)))

    def _mixed(self, wide: int, safe: int) -> float:
        """Step time while requests at the profile ``wide`` still run and a burst comes in at ``safe``."""
        rate = max(self._arrivals.busy(BUSY_LEVEL), self._arrivals.quantile(0.5)) / 1e3
        context = self._prompt_tokens + self._output_tokens / 2
        model = self._model
        wide_name, safe_name = self.profiles[wide], self.profiles[safe]
        first = model.step_ms(StepLoad({wide_name: 1, safe_name: 1}, {}, 2 * context))
        each = model.step_ms(StepLoad({wide_name: 1, safe_name: 2}, {}, 3 * context)) - first
        prompts = min(rate * self._prompt_tokens * model.prompt_token_ms(safe_name), MAX_PROMPT_SHARE)
        growth = rate * self._output_tokens * each / (1 - prompts)
        full = first + each * (self._max_running - 1)
        return (min(first / (1 - growth), full) if growth < 1 else full) / (1 - prompts)

    def _position(self, profile: str) -> int:
        if profile not in self._index:
            raise InputError(f"{profile!r} is not a profile of this replica; it holds {', '.join(self.profiles)}")
        return self._index[profile]

    def _choices(self, floor: str | None, allowed: Collection[str] | None) -> list[int]:
        """Indices that the request may get, narrow to wide; at least one."""
        lowest = self._floor if floor is None else max(self._floor, self._position(floor))
        indices = [index for index, name in enumerate(self.profiles) if allowed is None or name in allowed]
        if not indices:
            raise InputError(f"none of the allowed profiles {list(allowed or ())} is held; held are {', '.join(self.profiles)}")
        return [index for index in indices if index >= lowest] or indices[-1:]

    def _switch(
        self, key: tuple[int | None, int | None], budget: Budget, predicted: Sequence[_Times], roomier: Sequence[_Times]
    ) -> _Class:
        """The class's state after this decision."""
        now = self._clock()
        margin = 1 + self._margin
        target = self._target(budget, predicted, margin)
        roomy = self._target(budget, roomier, margin)
        state = self._classes.get(key)
        if state is None:
            state = _Class(target, -math.inf, -math.inf, [math.inf] * len(predicted))
            self._classes[key] = state
        for index in range(len(predicted)):
            if index > roomy:
                state.fits_since[index] = math.inf
            elif state.fits_since[index] == math.inf:
                state.fits_since[index] = now
        if target < state.level:
            if now - state.up_at >= HOLD_S:
                state.level, state.down_at = target, now
        elif now - state.down_at >= HOLD_S:
            wider = [since for since in state.fits_since[state.level + 1 :] if since < math.inf]
            # The widest that fits is worth waiting for: each switch makes batches mixed, and mixed batches slow, for a while.
            if wider and (now - wider[-1] >= HOLD_S or now - min(wider) >= PATIENCE_S):
                held = [index for index, since in enumerate(state.fits_since) if now - since >= HOLD_S]
                state.level, state.up_at = held[-1], now
        return state

    def _predict(self, index: int, load: Load, prompt_tokens: int, more: float = 1.0) -> _Times:
        """What a request at the profile ``index`` sees if all that follow get that profile too.

        Args:
            more: factor on the believed arrival rate.
        """
        profile = self.profiles[index]
        rate = self._arrivals.quantile(RATE_LEVEL) / 1e3 * self._headroom * more
        running: dict[str, float] = {name: float(count) for name, count in load.running.items() if count > 0}
        total = sum(running.values())
        context = load.context_tokens / total if total else self._prompt_tokens + self._output_tokens / 2
        # Prompts of those who come meanwhile are computed in the same steps and make them longer by this share.
        prompts = min(rate * self._prompt_tokens * self._model.prompt_token_ms(profile), MAX_PROMPT_SHARE)

        others = dict(running)
        others[profile] = others.get(profile, 0.0) + load.waiting
        if self._elastic:
            others = {profile: total + load.waiting}
        per_piece = self._output_tokens / LOOK_AHEAD
        # How long those that run still take, in output tokens: by renewal theory half of the mean square over the mean.
        staying = math.exp(-per_piece * 2 * self._output_tokens / self._square_output_tokens)
        elapsed = 0.0
        for _ in range(LOOK_AHEAD):
            tokens = self._capped({**others, profile: others[profile] + 1})
            step = self._model.step_ms(StepLoad(tokens, {}, context * sum(tokens.values()))) / (1 - prompts)
            elapsed += step * per_piece
            others = {name: count * staying for name, count in others.items()}
            others[profile] += rate * step * per_piece
        return _Times(
            elapsed / self._output_tokens,
            self._settled(profile, rate, context),
            self._settled(profile, max(rate, more * self._arrivals.busy(BUSY_LEVEL) / 1e3), context),
            self._ttft(profile, running, load, prompt_tokens),
        )

    def _settled(self, profile: str, rate: float, context: float) -> float:
        """Step time where as many sequences end as come: step = fixed + each * (rate * tokens * step)."""
        one = self._model.step_ms(StepLoad({profile: 1}, {}, context))
        each = self._model.step_ms(StepLoad({profile: 2}, {}, 2 * context)) - one
        prompts = min(rate * self._prompt_tokens * self._model.prompt_token_ms(profile), MAX_PROMPT_SHARE)
        growth = rate * self._output_tokens * each / (1 - prompts)
        full = one + each * (self._max_running - 1)
        return (min((one - each) / (1 - growth), full) if growth < 1 else full) / (1 - prompts)

    def _ttft(self, profile: str, running: Mapping[str, float], load: Load, prompt_tokens: int) -> float:
        """Until the prompts before it and its own are computed, and, if the engine is full, until it may start."""
        prompts = load.prefill_tokens + prompt_tokens
        steps = math.ceil(prompts / self._max_batched) or 1
        work = StepLoad(running, {profile: prompts / steps}, load.context_tokens)
        step = self._model.step_ms(work)
        total = sum(running.values())
        excess = total + load.waiting + 1 - self._max_running
        # Of the running ones, one ends every (output tokens / running) steps.
        queued = excess * self._output_tokens / max(total, 1.0) if excess > 0 else 0.0
        return step * (steps + queued)

    def _capped(self, tokens: dict[str, float]) -> dict[str, float]:
        total = sum(tokens.values())
        if total <= self._max_running:
            return tokens
        return {name: count * self._max_running / total for name, count in tokens.items()}


def _class_of(budget: Budget) -> tuple[tuple[int | None, int | None], Budget]:
    """The class that a budget belongs to, and that class's budget: never looser."""
    tpot_key, tpot = _rounded(budget.tpot_ms, *GRID["tpot"])
    ttft_key, ttft = _rounded(budget.ttft_ms, *GRID["ttft"])
    return (tpot_key, ttft_key), Budget(tpot, ttft)


def _rounded(value: float | None, first: float, ratio: float, count: int) -> tuple[int | None, float | None]:
    if value is None:
        return None, None
    index = min(max(math.floor(math.log(value / first, ratio) + 1e-9), 0), count - 1)
    return index, min(value, first * ratio**index)


def _fits(times: _Times, budget: Budget, margin: float) -> bool:
    return _within(max(times.tpot, times.settled), budget.tpot_ms, margin) and _within(times.ttft, budget.ttft_ms, margin)


def _within(predicted: float, bound: float | None, margin: float) -> bool:
    return bound is None or predicted * margin <= bound
