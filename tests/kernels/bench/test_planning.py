"""matgptq_vllm.kernels.bench.planning: memory and speed from shapes and measured products."""

import json
from pathlib import Path
from typing import Any

import pytest

from matgptq_vllm.kernels.bench.planning import LOADED, MEASURED, MODELLED, Gpu, loaded_speeds, main, plan
from matgptq_vllm.kernels.bench.shapes import MODELS

GPU = Gpu(141e9, 0.9)


@pytest.fixture
def results() -> dict[str, Any]:
    """Every product of the 8B model takes 10 microseconds at 32 rows; a copy moves 1 TB/s."""
    cells = [
        {"model": "llama-3.1-8b", "n": shape.n, "k": shape.k, "m": 32, "competitor": f"width-{width}", "us": 10.0}
        for shape in MODELS["llama-3.1-8b"]
        for width in (2, 3, 4, 6, 8)
    ]
    return {"group_size": 128, "device": {"copy_bytes_per_s": 1e12}, "cells": cells}


def test_memory_and_speed_of_the_measured_model(results: dict[str, Any]) -> None:
    found = plan("llama-3.1-8b", 4, 32, 1000, GPU, results)
    # 6.98e9 weights in 32 blocks, half a byte each and two bytes per 128; embedding and output layer of 128256 x 4096.
    assert found.weight_bytes == pytest.approx(6.979e9 * (0.5 + 2 / 128) + 2 * 2 * 128256 * 4096, rel=1e-3)
    # Keys and values of 8 heads of 128 in 32 layers, two bytes each: 128 KiB per token.
    assert found.sequences == int((141e9 * 0.9 - found.weight_bytes) // (1000 * 131072))
    assert found.step_s == pytest.approx(32 * 40e-6 + (2 * 128256 * 4096 + 32 * 1000 * 131072) / 1e12)
    assert found.tokens_per_s == pytest.approx(32 / found.step_s)
    assert found.gpu_hours == pytest.approx(1e6 / found.tokens_per_s / 3600)
    assert found.source == MEASURED


def test_other_models_are_in_proportion_and_load_tests_come_first(results: dict[str, Any]) -> None:
    found = plan("llama-3.1-70b", 8, 32, 1, GPU, results)
    ratio = sum(shape.num_weights for shape in MODELS["llama-3.1-70b"]) / sum(
        shape.num_weights for shape in MODELS["llama-3.1-8b"]
    )
    assert found.source == MODELLED
    assert found.step_s == pytest.approx(80 * 40e-6 * ratio, rel=0.7)
    assert found.weight_bytes == pytest.approx(73.7e9, rel=0.01)
    loaded = plan("llama-3.1-8b", 4, 32, 1000, GPU, results, loaded=1000.0)
    assert (loaded.tokens_per_s, loaded.step_s, loaded.source) == (1000.0, 0.032, LOADED)


def test_batches_of_one_width_are_as_fast_as_in_a_replica_of_one_width(results: dict[str, Any]) -> None:
    alone = [{**cell, "competitor": "alone-4", "us": 5.0} for cell in results["cells"] if cell["competitor"] == "width-4"]
    found = plan("llama-3.1-8b", 4, 32, 1000, GPU, {**results, "cells": results["cells"] + alone})
    assert found.step_s == pytest.approx(32 * 20e-6 + (2 * 128256 * 4096 + 32 * 1000 * 131072) / 1e12)


def test_the_command_prints_every_model_and_takes_load_tests(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, report = tmp_path / "results.json", tmp_path / "report.json"
    measured.write_text(json.dumps(results))
    run = {"precision": "4", "rate": "inf", "concurrency": 32, "partial": False, "summary": {"tokens_per_s": 1234.0}}
    others = [{**run, "precision": "auto"}, {**run, "rate": "2"}, {**run, "concurrency": 8}, {**run, "partial": True}]
    report.write_text(json.dumps({"runs": [run, *others]}))
    assert loaded_speeds(json.loads(report.read_text()), 32) == {4: 1234.0}
    assert main([str(measured), "--load-test", f"llama-3.1-8b={report}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 * 5
    assert [line for line in lines if LOADED in line] == [line for line in lines if "| 1234 |" in line]


def test_wrong_input_is_named(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, other = tmp_path / "results.json", tmp_path / "other.json"
    measured.write_text(json.dumps(results))
    other.write_text("[]")
    for arguments, message in (
        ([str(measured), "--batch", "5"], "--batch 5 was not measured at width 8; the results have 32"),
        ([str(measured), "--load-test", "gpt"], "is not MODEL=FILE with a model of llama-3.1-8b"),
        ([str(other)], "has no 'cells'"),
        ([str(tmp_path / "none.json")], "No such file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
