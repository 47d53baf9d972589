"""loadtests.bursts: the trace and the numbers; tests/e2e replays one against a real server."""

import json
from dataclasses import replace

import pytest

from loadtests.bursts import Trace, outcome, table

TRACE = Trace(seconds=2000, rate=1, burst=5, calm_s=20, burst_s=10, input_len=40, output_len=8, seed=1)


def test_arrivals_come_at_the_mean_of_both_rates():
    arrivals = TRACE.arrivals()
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] < TRACE.seconds
    # Two thirds of the time at 1 per second and one third at 5.
    assert len(arrivals) / TRACE.seconds == pytest.approx(7 / 3, rel=0.15)


def test_bursts_are_five_times_as_dense():
    per_second = [0] * 2000
    for arrival in TRACE.arrivals():
        per_second[int(arrival)] += 1
    assert sum(count >= 4 for count in per_second) > 300
    assert sum(count <= 1 for count in per_second) > 800
    assert len(replace(TRACE, burst=1).arrivals()) / 2000 == pytest.approx(1, rel=0.1)


def test_a_trace_is_written_as_vllm_reads_it(tmp_path):
    count = replace(TRACE, seconds=30).write(tmp_path / "trace.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len(entries) == count
    assert all(entry["input_length"] == 40 and entry["output_length"] == 8 for entry in entries)
    hashes = [number for entry in entries for number in entry["hash_ids"]]
    assert len(hashes) == len(set(hashes)) == 3 * count


def test_an_outcome_counts_a_failed_request_as_missed():
    result = {"completed": 3, "failed": 1, "itls": [[0.010, 0.020], [0.030, 0.040], [0.015], []]}
    found = outcome("auto", result, 20.0, {"8": 10, "2": 30}, {"8": 8.0, "2": 2.0})
    assert (found.requests, found.met, found.mean_width) == (4, 0.5, 3.5)
    assert found.tpot_p50_ms == pytest.approx(15)
    assert "50.0%" in table([found])
