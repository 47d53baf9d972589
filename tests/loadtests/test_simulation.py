"""The simulated engine does what it says, and the controller keeps its promises in it."""

import json
from itertools import pairwise

import pytest

from loadtests.simulation.__main__ import main
from loadtests.simulation.compare import SCENARIOS, outcome
from loadtests.simulation.engine import GPU, WIDTHS, Hardware
from loadtests.simulation.oracle import plan
from loadtests.simulation.policies import Controlled, Fixed, Plan, serve
from loadtests.simulation.trace import Arrival, Traffic, draw
from serve.budget import Budget
from serve.controller import HOLD_S

PLAIN = Hardware("plain", 2.0, (1.0,) * 5, (0.0,) * 5, 1.0, 0.1, 0.0, 0.0, hiccup_share=0.0)


def test_a_trace_is_reproducible_and_bursts_are_five_times_as_dense() -> None:
    traffic = Traffic(4.0, calm_s=60, burst_s=20)
    trace = draw(traffic, 4000, 3)
    assert trace == draw(traffic, 4000, 3)
    assert [arrival.number for arrival in trace] == list(range(len(trace)))
    assert all(a.at_s <= b.at_s for a, b in pairwise(trace))
    calm = [b.at_s - a.at_s for a, b in pairwise(trace) if not a.in_burst and not b.in_burst]
    burst = [b.at_s - a.at_s for a, b in pairwise(trace) if a.in_burst and b.in_burst]
    assert sorted(calm)[len(calm) // 2] / sorted(burst)[len(burst) // 2] == pytest.approx(5, rel=0.15)


def test_one_request_takes_its_prompt_and_its_tokens() -> None:
    (served,) = serve([Arrival(0, 1.0, 1500, 5, False)], PLAIN, Fixed(8), 0).requests
    chunks = [1024, 476]
    prompt = sum(2.0 + 0.5 * (1 + 0.1 * c) + 0.5 * (1 + (0.1 * c) ** 2) ** 0.5 for c in chunks)
    assert served.ttft_ms == pytest.approx(prompt, rel=0.06)
    assert served.tpot_ms == pytest.approx(3.0, rel=0.06)


def test_every_request_is_served_whole_by_every_policy() -> None:
    trace = draw(Traffic(4.0), 15, 1)
    for elastic in (False, True):
        run = serve(trace, GPU, Controlled(GPU, Budget(20.0), 0, elastic), 0, elastic)
        assert all(served.finished_s > served.first_s > served.arrival.at_s for served in run.requests)
        assert sum(run.tokens) == sum(arrival.output_tokens - 1 for arrival in trace)


def test_copies_of_an_engine_run_alike() -> None:
    trace = draw(Traffic(4.0), 20, 1)
    whole = serve(trace, GPU, Plan([0.0, 10.0], [4, 2]), 5)
    again = serve(trace, GPU, Plan([0.0, 10.0], [4, 2]), 5)
    assert [served.finished_s for served in whole.requests] == [served.finished_s for served in again.requests]
    assert {WIDTHS[index] for index in whole.admitted} == {8, 4}


def test_the_oracle_is_wider_than_the_best_fixed_width_and_meets_the_share() -> None:
    trace = draw(Traffic(6.0, calm_s=3, burst_s=3, output_tokens=60), 9, 1)
    planned = plan(trace, GPU, 14.0, 1, 0.95)
    found = outcome(serve(trace, GPU, Plan(planned.starts_s, planned.widths), 1), 14.0)
    fixed = [outcome(serve(trace, GPU, Fixed(width), 1), 14.0) for width in WIDTHS]
    assert found.met >= 0.95
    assert found.width_requests >= max(width.width_requests for width in fixed if width.met >= 0.95)


@pytest.mark.parametrize(("name", "seed"), [("gpu", 0), ("cpu", 1)])
def test_the_controller_meets_the_budget_where_width_8_does_not_and_stays_wide(name: str, seed: int) -> None:
    scenario = SCENARIOS[name]
    trace = draw(scenario.traffic, 160, seed)
    eight = outcome(serve(trace, scenario.hardware, Fixed(8), seed), scenario.tpot_ms)
    policy = Controlled(scenario.hardware, Budget(scenario.tpot_ms), seed, elastic=True)
    controlled = outcome(serve(trace, scenario.hardware, policy, seed, elastic=True), scenario.tpot_ms)
    assert eight.met < 0.75
    assert controlled.met >= 0.95
    assert controlled.width_tokens > 5
    assert controlled.least_reversal_s is None or controlled.least_reversal_s >= HOLD_S
    assert policy.model.mean_error is not None
    assert policy.model.mean_error < 0.12


def test_the_command_writes_what_it_prints(tmp_path, capsys) -> None:
    assert main(["--out", str(tmp_path), "--seconds", "12", "--scenario", "cpu", "--no-oracle", "--elastic"]) == 0
    (document,) = json.loads((tmp_path / "results.json").read_text())
    assert set(document["policies"]) == {"fixed 2", "fixed 3", "fixed 4", "fixed 6", "fixed 8", "controller"}
    assert (tmp_path / "results.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_is_too_short_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--seconds", "nan"])
    assert "at least 10 s" in capsys.readouterr().err
