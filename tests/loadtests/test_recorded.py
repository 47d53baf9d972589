"""loadtests.simulation.recorded: a real run's requests, served again by the engine that its server described."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtests.records import CANCELLED, COMPLETED, Record, read_records, write_records
from loadtests.simulation.policies import Controlled
from loadtests.simulation.recorded import Fitted, arrivals_of, main, measured, simulate
from matgptq_vllm.core.errors import InputError
from serve.budget import Budget
from serve.load import StepLoad

# Steps of five sequences take 70 ms at 8 bits and 50 at 2.
MODEL = {
    "mean_error": 0.0,
    "coefficients": {
        "base": 10.0,
        "fixed": {"2": 10.0, "3": 14.0, "4": 18.0, "6": 24.0, "8": 30.0},
        "decode": dict.fromkeys(("2", "3", "4", "6", "8"), 6.0),
        "prefill": dict.fromkeys(("2", "3", "4", "6", "8"), 0.1),
        "context": 0.001,
    },
}
HARDWARE = Fitted.of(MODEL, 64, 1024)


def record(number: int, due_s: float, tpot_ms: float, outcome: str = COMPLETED) -> Record:
    gaps = (tpot_ms / 1e3,) * 19
    return Record(number, "auto", "8", outcome, 200, due_s, due_s, 0.1, gaps, due_s + sum(gaps), 20, 20)


CALM = [record(number, 3.0 * number, 50.0) for number in range(12)]
BURST = [record(100 + number, 36.0 + 0.25 * number, 70.0 if number % 2 else 60.0) for number in range(80)]


def test_a_step_takes_what_the_formula_of_the_latency_model_says() -> None:
    assert HARDWARE.step_ms([1, 0, 0, 0, 2], [0, 0, 0, 0, 30], 500, 7.0) == pytest.approx(10 + 10 + 6 + 30 + 12 + 3 + 0.5)


def test_a_step_takes_as_much_longer_as_the_machine_was_slower_in_that_second() -> None:
    slower = replace(HARDWARE, speeds=(1.0, 2.0))
    usual = HARDWARE.step_ms([1, 0, 0, 0, 0], [0] * 5, 0, 0.0)
    assert [slower.step_ms([1, 0, 0, 0, 0], [0] * 5, 0, at) / usual for at in (0.5, 1.5, 9.0)] == [1.0, 2.0, 2.0]


def test_a_token_takes_longer_while_prompts_come_and_its_width_may_be_a_mean() -> None:
    assert HARDWARE.token_ms(8, 5, 0, 0, 0) == pytest.approx(70.0)
    assert HARDWARE.token_ms(5, 5, 0, 0, 0) == pytest.approx((58 + 64) / 2)
    assert HARDWARE.token_ms(2, 5, 1000, 10, 20) == pytest.approx(51 / (1 - 0.02))


def test_requests_that_did_not_end_are_left_out_and_the_others_in_order_of_time() -> None:
    trace = arrivals_of([record(0, 2.0, 50.0), record(1, 1.0, 50.0, CANCELLED), record(2, 0.5, 50.0)])
    assert [(one.number, one.at_s, one.prompt_tokens, one.output_tokens) for one in trace] == [
        (0, 0.5, 20, 20),
        (1, 2.0, 20, 20),
    ]


def samples_of(records: list[Record], width_at: Callable[[float], float]) -> list[dict[str, Any]]:
    """As of a server that is asked twice a second, without a warm-up."""
    return [
        {
            "time_s": at / 2,
            "running": sum(one.start_s <= at / 2 < one.end_s for one in records),
            "waiting": 0,
            "width": width_at(at / 2),
        }
        for at in range(150)
    ]


def test_what_was_measured_is_counted_per_request_and_per_token() -> None:
    met, width = measured([*CALM, *BURST], samples_of([*CALM, *BURST], lambda at_s: 8.0 if at_s < 35 else 2.0), 65.0)
    assert met == (12 + 40) / 92
    assert width == pytest.approx((12 * 8 + 80 * 2) / 92, abs=0.02)


def test_what_nobody_sampled_is_refused() -> None:
    with pytest.raises(InputError, match="no sample of the timeline has a width"):
        measured(CALM, [], 65.0)


def test_the_oracle_is_wide_where_there_is_time_and_meets_the_budget_where_width_8_does_not() -> None:
    found = simulate([*CALM, *BURST], HARDWARE, 65.0)
    assert set(found) == {"fixed 2", "fixed 3", "fixed 4", "fixed 6", "fixed 8", "controller", "oracle"}
    assert found["fixed 8"].met < 0.6
    assert found["oracle"].met >= 0.95
    assert 2 < found["oracle"].width_tokens < 8


def test_the_command_prints_the_share_of_the_oracles_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline, records, out = tmp_path / "timeline.json", tmp_path / "auto.jsonl", tmp_path / "oracle.json"
    samples = samples_of([*CALM, *BURST], lambda at_s: 6.0)
    told = {"budget_ms": 65.0, "latency_model": MODEL, "samples": samples}
    timeline.write_text(json.dumps(told))
    write_records([*CALM, *BURST], records)
    assert main([str(timeline), str(records), "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["measured"]["width_tokens"] == 6.0
    assert document["width_of_oracle"] == pytest.approx(6.0 / document["simulated"]["oracle"]["width_tokens"])
    assert f"{document['width_of_oracle']:.0%}" in capsys.readouterr().out


def test_a_timeline_without_a_budget_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = tmp_path / "timeline.json"
    timeline.write_text(json.dumps({"budget_ms": None, "latency_model": MODEL}))
    with pytest.raises(SystemExit):
        main([str(timeline), str(tmp_path / "auto.jsonl")])
    assert "--budget-ms" in capsys.readouterr().err


def test_the_controllers_sweep_does_not_take_one_slow_second_for_the_machine() -> None:
    # Five times as slow in the first second, which is a part of the sweep only.
    slow = replace(HARDWARE, speeds=(5.0, *[1.0] * 60))
    usual = HARDWARE.step_ms([0, 0, 0, 0, 8], [0] * 5, 320, 0.0)
    instant, lasting = (Controlled(slow, Budget(65.0), 0, True, lasts) for lasts in (False, True))
    load = StepLoad({"8": 8}, {}, 320)
    assert instant.model.step_ms(load) > 3 * usual
    assert lasting.model.step_ms(load) < 1.5 * usual


def test_records_that_were_compressed_are_read(tmp_path: Path) -> None:
    write_records(CALM, tmp_path / "000.jsonl")
    (tmp_path / "000.jsonl.gz").write_bytes(gzip.compress((tmp_path / "000.jsonl").read_bytes()))
    assert read_records(tmp_path / "000.jsonl.gz") == CALM
