"""The policies on one trace, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from loadtests.simulation.engine import BLOCK_CPU, CPU, GPU, H200, ROWS, SHAKY_CPU, WIDTHS, Hardware
from loadtests.simulation.oracle import plan, spans_of
from loadtests.simulation.policies import Controlled, Fixed, Plan, Run, serve
from loadtests.simulation.trace import Arrival, Traffic, draw
from serve.budget import Budget
from serve.hysteresis import HOLD_S

TARGET_SHARE = 0.95
"""Share of requests that are to meet the budget; the oracle is asked for no more."""


@dataclass(frozen=True)
class Scenario:
    """An engine, its traffic, and the time per output token to keep."""

    hardware: Hardware
    traffic: Traffic
    tpot_ms: float


SCENARIOS = {
    "gpu": Scenario(GPU, Traffic(4.0), 20.0),
    "h200": Scenario(H200, Traffic(4.0, prompt_tokens=80, output_tokens=192), 4.9),
    "cpu": Scenario(CPU, Traffic(1.8, prompt_tokens=60, output_tokens=60), 60.0),
    "block": Scenario(BLOCK_CPU, Traffic(0.9, prompt_tokens=16, output_tokens=32), 95.0),
    "rows": Scenario(ROWS, Traffic(2.5, prompt_tokens=100), 21.0),
    "shaky": Scenario(SHAKY_CPU, Traffic(0.8, prompt_tokens=16, output_tokens=32, same_lengths=True), 150.0),
}


@dataclass(frozen=True)
class Outcome:
    """What a policy did with a trace."""

    met: float
    """Share of the requests whose time per output token is within the budget."""

    width_tokens: float
    """Mean width, each decoded token counting once."""

    width_requests: float
    """Mean width at admission, each request counting once."""

    switches: int
    """How often the policy changed the width."""

    least_reversal_s: float | None
    """Least time between switches in opposite directions that follow one another; None if there are none."""

    ttft_p95_ms: float


def compare(
    scenario: Scenario, seconds: float, seed: int, elastic: bool, oracle: bool, hold_s: float = HOLD_S
) -> tuple[dict[str, Any], dict[str, Run]]:
    """(document, runs by policy) of one trace.

    Args:
        elastic: whether running requests follow the controller's, or the oracle's, width.
        oracle: whether to search for the oracle's plan, which takes minutes.
        hold_s: least time between switches in opposite directions in the oracle's plan.
    """
    trace = draw(scenario.traffic, seconds, seed)
    hardware = scenario.hardware
    controlled = Controlled(hardware, Budget(scenario.tpot_ms), seed, elastic)
    runs = runs_of(trace, hardware, controlled, scenario.tpot_ms, seed, elastic, oracle, hold_s)
    outcomes = {name: outcome(run, scenario.tpot_ms) for name, run in runs.items()}
    document: dict[str, Any] = {
        "scenario": hardware.name,
        "seed": seed,
        "seconds": seconds,
        "elastic": elastic,
        "tpot_ms": scenario.tpot_ms,
        "requests": len(trace),
        "in_bursts": sum(arrival.in_burst for arrival in trace) / len(trace),
        "policies": {name: asdict(found) for name, found in outcomes.items()},
        "model_error": controlled.model.mean_error,
    }
    if oracle:
        document["width_of_oracle"] = outcomes["controller"].width_tokens / outcomes["oracle"].width_tokens
    return document, runs


def runs_of(
    trace: Sequence[Arrival],
    hardware: Hardware,
    controlled: Controlled,
    tpot_ms: float,
    seed: int,
    elastic: bool,
    oracle: bool = True,
    hold_s: float = HOLD_S,
) -> dict[str, Run]:
    """``trace`` served by every fixed width, the controller and the oracle; arguments as of ``compare``."""
    runs = {f"fixed {width}": serve(trace, hardware, Fixed(width), seed) for width in WIDTHS}
    runs["controller"] = serve(trace, hardware, controlled, seed, elastic)
    if oracle:
        known = [spans_of(runs["controller"].levels, trace)]
        planned = plan(trace, hardware, tpot_ms, seed, TARGET_SHARE, elastic, hold_s, known)
        runs["oracle"] = serve(trace, hardware, Plan(planned.starts_s, planned.widths), seed, elastic)
    return runs


def outcome(run: Run, tpot_ms: float) -> Outcome:
    """The measures of one run."""
    requests = run.requests
    ttft = sorted(served.ttft_ms for served in requests)
    switches = switches_of(run.levels)
    gaps = [later - earlier for (earlier, up), (later, other) in pairwise(switches) if up != other]
    return Outcome(
        met=sum(served.tpot_ms <= tpot_ms for served in requests) / len(requests),
        width_tokens=sum(width * count for width, count in zip(WIDTHS, run.tokens, strict=True)) / sum(run.tokens),
        width_requests=sum(WIDTHS[index] for index in run.admitted) / len(requests),
        switches=len(switches),
        least_reversal_s=min(gaps, default=None),
        ttft_p95_ms=ttft[int(0.95 * (len(ttft) - 1))],
    )


def switches_of(levels: Sequence[tuple[float, int]]) -> list[tuple[float, bool]]:
    """(seconds, whether to a wider one) of each change of the level."""
    return [(at, after > before) for (_, before), (at, after) in pairwise(levels) if after != before]
