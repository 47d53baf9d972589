"""What a load test's numbers and verdicts are: statistics, objectives, comparison, gate and soak checks on made records."""

import math
from dataclasses import replace

import pytest

from loadtests.campaign import AGAINST, TESTED, Cell, Run
from loadtests.comparison import compare, geometric_mean
from loadtests.gate import regressions
from loadtests.objectives import Objectives, parse_objectives
from loadtests.options import Rate, Soak
from loadtests.records import CANCELLED, COMPLETED, FAILED, REFUSED, Record
from loadtests.statistics import by_precision, duration_s, summarize
from loadtests.watch import Sample, checks
from matgptq_vllm.core.errors import InputError

GOOD = Record(0, "auto", "8", COMPLETED, 200, 1.0, 1.5, 0.1, (0.02, 0.04), 1.66, 10, 3)
SLO = Objectives(ttft=600, tpot=30)


def summary_of(*records: Record, slo: Objectives = SLO):
    return summarize(records, slo, {"8": 8.0, "2": 2.0}, duration_s(records))


def test_a_summary_counts_from_when_requests_were_due() -> None:
    found = summary_of(
        GOOD, replace(GOOD, given="2", due_s=0.0, end_s=2.0), replace(GOOD, outcome=FAILED, status=500, error="x\ny")
    )
    assert (found.completed, found.failed, found.duration_s) == (2, 1, 2.0)
    assert (found.requests_per_s, found.tokens_per_s, found.total_tokens_per_s) == (1.0, 3.0, 13.0)
    # 0.5 s of waiting for the bound on concurrency and 0.1 s to the first token; the other one waited for 1.5 s.
    assert found.ttft.p50 == pytest.approx((600 + 1600) / 2)
    assert (found.itl.mean, found.tpot.p99) == (pytest.approx(30), pytest.approx(30))
    assert (found.good_share, found.goodput_per_s) == (pytest.approx(1 / 3), 0.5)
    assert found.mean_width == 5.0
    assert found.errors == {"500: y": 1}
    assert found.tokens == {"8": 3, "2": 3}


def test_what_was_cancelled_or_refused_on_purpose_neither_meets_nor_misses() -> None:
    found = summary_of(GOOD, replace(GOOD, outcome=CANCELLED), replace(GOOD, outcome=REFUSED, status=400))
    assert (found.requests, found.cancelled, found.refused, found.good_share) == (3, 1, 1, 1.0)
    assert summary_of(replace(GOOD, outcome=CANCELLED)).good_share is None


def test_records_are_grouped_by_the_precision_of_the_answer() -> None:
    groups = by_precision([GOOD, replace(GOOD, given=None), replace(GOOD, given="2")])
    assert {name: len(group) for name, group in groups.items()} == {"2": 1, "8": 1, "auto": 1}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:-1", "itl:3", "tpot:x"])
def test_objectives_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no objective"):
        parse_objectives(text)


def test_objectives_are_read_and_applied() -> None:
    assert parse_objectives("ttft:600,tpot:30") == SLO
    assert SLO.met(GOOD)
    assert not Objectives(ttft=599).met(GOOD)
    assert not Objectives(e2e=659).met(GOOD)
    assert not Objectives().met(replace(GOOD, outcome=FAILED))


def run_of(server: str, repeat: int, tokens: int, partial: bool = False) -> Run:
    summary = summary_of(replace(GOOD, output_tokens=tokens))
    return Run(server, Cell("4", Rate(2.0), 8), repeat, 2.0, partial, summary, {}, 0.0, 0.0, [])


def test_ratios_have_an_interval_over_the_repeats() -> None:
    runs = [run_of(name, repeat, tokens) for repeat, pair in enumerate([(30, 20), (33, 20), (27, 20)]) for name, tokens in
            zip((TESTED, AGAINST), pair, strict=True)]  # fmt: skip
    ratio = next(one for one in compare(runs) if one.number == "tokens/s")
    assert ratio.ratio == pytest.approx((1.5 * 1.65 * 1.35) ** (1 / 3))
    assert ratio.low == pytest.approx(1.35)
    assert ratio.high == pytest.approx(1.65)
    assert ratio.repeats == 3


def test_single_repeats_have_no_interval_and_interrupted_runs_no_ratio() -> None:
    assert geometric_mean([2.0]) == (pytest.approx(2.0), None, None)
    assert compare([run_of(TESTED, 0, 30), run_of(AGAINST, 0, 20, partial=True)]) == []


def report_of(tokens_per_s: float, p50: float | None, seed: int = 0, rate: str = "2", partial: bool = False) -> dict:
    latency = {"p50": p50, "p90": p50}
    summary = {
        "requests_per_s": 1.0,
        "tokens_per_s": tokens_per_s,
        "goodput_per_s": 1.0,
        "ttft": latency,
        "itl": latency,
        "e2e": latency,
    }
    run = {"server": TESTED, "precision": "4", "rate": rate, "concurrency": 8, "partial": partial, "summary": summary}
    return {"load": {"workload": {"seed": seed}, "slo": {}}, "runs": [run]}


def test_the_gate_finds_what_is_worse_by_more_than_allowed() -> None:
    before = report_of(100, 20)
    assert regressions(report_of(91, 21.9), before, 0.10) == []
    worse = regressions(report_of(89, 19), before, 0.10)
    assert [(one.number, one.worse) for one in worse] == [("tokens_per_s", pytest.approx(0.11))]
    assert "tokens_per_s was 100 and is 89, 11.0% worse" in str(worse[0])
    assert {one.number for one in regressions(report_of(100, 23), before, 0.10)} == {
        f"{name}.{p}" for name in ("ttft", "itl", "e2e") for p in ("p50", "p90")
    }
    assert regressions(report_of(100, None), before, 0.10)[0].worse == math.inf


def test_the_gate_refuses_what_does_not_compare() -> None:
    with pytest.raises(InputError, match="different loads do not compare"):
        regressions(report_of(100, 20, seed=1), report_of(100, 20), 0.1)
    for other in (report_of(100, 20, rate="4"), report_of(100, 20, partial=True)):
        with pytest.raises(InputError, match="has no finished run at the precisions"):
            regressions(report_of(100, 20), other, 0.1)


IDLE = Sample(0, 1, 0, 0, 0)
STEADY = replace(GOOD, gaps_s=(0.02,))


def soak_checks(
    growth: float, drift: float, idle: Sample | None, last: Record = STEADY, unanswered: int = 0
) -> dict[str, bool]:
    memory = [100.0] * 10 + [500.0] * 80 + [100.0 * (1 + growth)] * 10
    samples = [Sample(float(time), value, 0.5, 1, 0) for time, value in enumerate(memory)]
    slow = (0.02 * (1 + drift),)
    records = [replace(GOOD, start_s=10.0 * k, end_s=10.0 * k + 5, gaps_s=(0.02,) if k < 20 else slow) for k in range(30)]
    return {check.name: check.passed for check in checks(Soak(), samples, idle, [*records, last], unanswered)}


def test_a_soak_test_passes_where_nothing_grows() -> None:
    assert all(soak_checks(0.019, 0.09, IDLE, replace(STEADY, outcome=CANCELLED)).values())


@pytest.mark.parametrize(
    ("arguments", "failed"),
    [
        ((0.021, 0, IDLE), "memory growth"),
        ((0, 0.11, IDLE), "p99 inter-token latency"),
        ((0, 0, replace(IDLE, kv_cache=0.01)), "held by the server"),
        ((0, 0, replace(IDLE, waiting=1)), "held by the server"),
        ((0, 0, None), "held by the server"),
        ((0, 0, IDLE, replace(STEADY, outcome=FAILED)), "failed requests"),
        ((0, 0, IDLE, STEADY, 1), "unanswered"),
    ],
)
def test_each_soak_check_fails_alone(arguments: tuple, failed: str) -> None:
    assert [name for name, passed in soak_checks(*arguments).items() if not passed and failed in name]
    assert sum(not passed for passed in soak_checks(*arguments).values()) == 1
