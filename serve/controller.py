"""Which profile an ``auto`` request gets: the widest that is predicted to meet its budget (``serve.forecast``).

    target  the widest profile at which the request meets its bounds, with the learned margin to spare. Where requests keep
            their width to the end, batches of two widths are slow for as long as the last wide request lives. There the
            profile must also hold once the load has settled, and be either one that holds in a burst (``safe``), or one
            from which a burst can still be met by stepping down to that one.
    none    the widest that holds once the load has settled; else the narrowest

Where requests follow (``elastic``), the target is the profile with the best prospect for all that run and come
(``serve.lookahead``), or the narrowest if a request that comes now would miss its budget at every one.

Each class of budgets (tpot within 2%, ttft within 20%) has a level, the widest profile that its requests get
(``serve.hysteresis``). Floor and allowed profiles of a request only clip it. Pure: the clock is an argument.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from matgptq_vllm.core.errors import InputError
from serve.budget import Budget
from serve.forecast import Forecast, Rates, Times
from serve.hysteresis import Level
from serve.latency_model import LatencyModel
from serve.load import Load
from serve.lookahead import RATE_LEVELS, Lookahead
from serve.price import Price

HEADROOM = 1.15
"""A wider profile must fit even if so many times as many requests come."""

MARGIN = 0.1
"""First margin: predictions must stay so far below a budget, as a share of them."""

MIN_MARGIN = 0.02

MAX_MARGIN = 0.6

MARGIN_RATE = 0.01
"""How far the margin moves with each miss."""

MISSES = 0.02
"""Share of misses at which the margin rests: less than the 0.05 that are allowed."""

TPOT_GRID = (0.05, 1.02, 701)
"""First value in ms, ratio, and count: budgets are rounded down to this grid, so that what clients send bounds no memory."""

TTFT_GRID = (1.0, 1.2, 65)


@dataclass(frozen=True)
class Decision:
    """What one request gets."""

    profile: str
    reason: str
    """``budget``: predicted to meet the budget; ``best-effort``: not; ``auto``: there is none (``serve.admission``)."""

    predicted_tpot_ms: float | None
    """Without margin; None while nothing is known."""

    predicted_ttft_ms: float | None
    meets: bool
    """Whether both bounds are predicted to be met."""

    budget: Budget | None = None
    """What was aimed at."""


BudgetClass = tuple[int | None, int | None]


class Controller:
    """Chooses profiles. For one event loop, not for threads.

    Args:
        model: of the same profiles.
        profiles: narrow to wide.
        clock: monotonic seconds.
        max_running: sequences that the engine runs at most, None for no bound.
        max_batched_tokens: tokens that the engine computes at most in a step.
        elastic: running ``auto`` requests follow the level of their class (``level``).
    """

    def __init__(
        self,
        model: LatencyModel,
        profiles: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
        max_running: int | None = None,
        max_batched_tokens: int = 2048,
        elastic: bool = False,
    ) -> None:
        if tuple(profiles) != model.profiles:
            raise InputError(f"the controller's profiles {list(profiles)} are not the model's, {list(model.profiles)}")
        self.profiles = tuple(profiles)
        self.margin = MARGIN
        """Learned: rises when requests that were predicted to meet their budget miss it, and falls when they do not."""

        self.price = Price(clock)
        """Learned in the same way; what counts for time per token where requests follow."""

        self._model = model
        self._index = {name: index for index, name in enumerate(self.profiles)}
        self._clock = clock
        self._elastic = elastic
        limit = math.inf if max_running is None else max(1, max_running)
        self._forecast = Forecast(model, clock, limit, max(1, max_batched_tokens))
        self._levels: dict[BudgetClass, Level] = {}

    def decide(
        self,
        budget: Budget,
        load: Load,
        prompt_tokens: int,
        floor: str | None = None,
        allowed: Collection[str] | None = None,
    ) -> Decision:
        """The profile of an ``auto`` request that arrives now.

        Args:
            budget: of the request; one without bounds is met by every profile.
            load: of the engine, without this request; ``following`` are the requests of the same class (``class_of``).
            floor: narrowest profile for this request, None for any.
            allowed: the profiles that it may get, None for all. Where all are below the floor, it gets the widest of them.

        Raises:
            InputError: ``allowed`` names no profile of this replica, or ``floor`` is none of them.
        """
        choices = self._choices(floor, allowed)
        self.arrived(prompt_tokens)
        level, times = self._look(budget, load, prompt_tokens, joins=True)
        chosen = _clipped(level, choices)
        at = times(chosen)
        tpot, ttft = at.tpot, at.ttft
        meets = _within(tpot, budget.tpot_ms) and _within(ttft, budget.ttft_ms)
        reason = "budget" if meets else "best-effort"
        if not self._model.num_observations:
            return Decision(self.profiles[chosen], reason, None, None, meets, budget)
        return Decision(self.profiles[chosen], reason, tpot, ttft, meets, budget)

    def review(self, budget: Budget, load: Load) -> None:
        """Look again at the class of ``budget`` while nothing arrives: where running requests follow, they may step too.

        Args:
            load: as for ``decide``.
        """
        self._look(budget, load, 0, joins=False)

    def profile(self, budget: Budget, floor: str | None = None, allowed: Collection[str] | None = None) -> str | None:
        """What the class of ``budget`` gets now within ``floor`` and ``allowed``; None before its first decision."""
        state = self._levels.get(class_of(budget))
        return None if state is None else self.profiles[_clipped(state.index, self._choices(floor, allowed))]

    def arrived(self, prompt_tokens: int) -> None:
        """Take note of a request that arrives now. ``decide`` does it for its own; call it for requests that name their
        precision: they are load too."""
        self._forecast.arrived(prompt_tokens)

    def finished(
        self, decision: Decision | None, output_tokens: int, tpot_ms: float | None, prompt_tokens: int | None = None
    ) -> None:
        """Learn from a request that came to its end.

        Args:
            decision: what ``decide`` said of it; None if its precision was named.
            tpot_ms: measured time per output token after the first; None if there was none.
            prompt_tokens: computed for it, which may be others than were thought at its arrival; None if not known.
        """
        self._forecast.ended(output_tokens, prompt_tokens)
        if decision is None or not decision.meets or tpot_ms is None:
            return
        if decision.budget is None or decision.budget.tpot_ms is None:
            return
        missed = tpot_ms > decision.budget.tpot_ms
        self.price.learn(missed)
        moved = self.margin + MARGIN_RATE * (missed - MISSES)
        self.margin = min(max(moved, MIN_MARGIN), MAX_MARGIN)

    def _position(self, profile: str) -> int:
        if profile not in self._index:
            raise InputError(f"{profile!r} is not a profile of this replica; it holds {', '.join(self.profiles)}")
        return self._index[profile]

    def _choices(self, floor: str | None, allowed: Collection[str] | None) -> list[int]:
        """Indices that the request may get, narrow to wide; at least one."""
        lowest = 0 if floor is None else self._position(floor)
        indices = [index for index, name in enumerate(self.profiles) if allowed is None or name in allowed]
        if not indices:
            raise InputError(f"none of the allowed profiles {list(allowed or ())} is held; held are {', '.join(self.profiles)}")
        return [index for index in indices if index >= lowest] or indices[-1:]

    def _look(self, budget: Budget, load: Load, prompt_tokens: int, joins: bool) -> tuple[int, Callable[[int], Times]]:
        """(level of the class after this look, times by index of the profile)."""
        rounded, key = _on_grid(budget), class_of(budget)
        if self._elastic and rounded.tpot_ms is not None:
            return self._look_ahead(rounded, key, load, prompt_tokens, joins)
        rates = self._forecast.rates()
        times = [self._forecast.times(name, load, prompt_tokens, rates.now) for name in self.profiles]
        more = self._forecast.rates(HEADROOM)
        busier = [self._forecast.times(name, load, prompt_tokens, more.now) for name in self.profiles]
        target, roomy = self._target(rounded, times, rates), self._target(rounded, busier, more)
        state = self._levels.setdefault(key, Level(target, len(self.profiles)))
        state.keep(target, roomy, self._clock())
        return state.index, times.__getitem__

    def _look_ahead(
        self, budget: Budget, key: BudgetClass, load: Load, prompt_tokens: int, joins: bool
    ) -> tuple[int, Callable[[int], Times]]:
        """``_look`` where requests follow and have a budget for time per token."""
        assert budget.tpot_ms is not None
        state = self._levels.get(key)
        scene = self._forecast.scene(load, prompt_tokens, joins, budget.tpot_ms)
        ttft = [self._forecast.ttft(name, load, prompt_tokens) for name in self.profiles] if budget.ttft_ms is not None else []
        timely = [index for index, ms in enumerate(ttft) if _within(ms * (1 + self.margin), budget.ttft_ms)]
        ahead = Lookahead(
            scene,
            self._forecast.likely_rates(RATE_LEVELS),
            None if state is None else state.index,
            self.price.bits,
            timely if ttft else range(len(self.profiles)),
        )

        def times(index: int) -> Times:
            return Times(ahead.pace_ms(index), self._forecast.ttft(self.profiles[index], load, prompt_tokens))

        if state is None:
            self._levels[key] = state = Level(max(range(len(ahead.values)), key=ahead.values.__getitem__), len(ahead.values))
        else:
            state.follow(ahead.values, self._clock())
        return state.index, times

    def _target(self, budget: Budget, times: Sequence[Times], rates: Rates) -> int:
        """Index of the profile for now, hysteresis aside."""
        margin = 1 + self.margin
        timely = [index for index, at in enumerate(times) if _within(at.ttft * margin, budget.ttft_ms)]
        fits = [index for index in timely if _within(times[index].tpot * margin, budget.tpot_ms)]
        if budget.tpot_ms is None:
            return max(fits, default=0)
        limit = budget.tpot_ms / margin
        settles = [index for index in timely if self._forecast.settled(self.profiles[index], rates.now) <= limit]
        holds = [index for index in settles if self._forecast.settled(self.profiles[index], rates.busy) <= limit]
        safe = max(holds, default=0)

        def retreats(wide: int) -> bool:
            """Whether a burst that finds the engine at ``wide`` can be met at ``safe``."""
            return self._forecast.mixed(self.profiles[wide], self.profiles[safe], rates.busy) <= limit * margin

        good = [index for index in fits if index in settles and (index <= safe or retreats(index))]
        return max(good, default=safe or max(settles, default=0))


def class_of(budget: Budget) -> BudgetClass:
    """The class that a budget belongs to: its places on the grids."""
    return _rounded(budget.tpot_ms, *TPOT_GRID)[0], _rounded(budget.ttft_ms, *TTFT_GRID)[0]


def _on_grid(budget: Budget) -> Budget:
    """The budget of the whole class, never looser."""
    return Budget(_rounded(budget.tpot_ms, *TPOT_GRID)[1], _rounded(budget.ttft_ms, *TTFT_GRID)[1])


def _clipped(level: int, choices: Sequence[int]) -> int:
    return max((index for index in choices if index <= level), default=choices[0])


def _rounded(value: float | None, first: float, ratio: float, count: int) -> tuple[int | None, float | None]:
    if value is None:
        return None, None
    index = min(max(math.floor(math.log(value / first, ratio) + 1e-9), 0), count - 1)
    return index, min(value, first * ratio**index)


def _within(predicted: float, bound: float | None) -> bool:
    return bound is None or predicted <= bound
