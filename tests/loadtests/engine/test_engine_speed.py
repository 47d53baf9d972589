"""The comparison of engines: what is written for vLLM, what is made of the numbers, and one real run."""

import json
import os
from pathlib import Path

import pytest

from loadtests.engine import report
from loadtests.engine.__main__ import main
from loadtests.engine.folders import write_parent, write_peer
from loadtests.engine.measure import Plan, decode_ms, engine_options, prefill_tokens_per_s
from loadtests.engine.shapes import SHAPES
from loadtests.engine.variants import precisions
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.core.storage import plane_bytes, scale_bytes

PLAN = Plan("ours", "folder", (1, 8), ("2", "mix48"), 100, 8, 64, 8, (16,), 256, 2, False, 1024, None)


def test_the_parent_has_the_layers_of_llama_8b_and_is_readable_without_tensors(tmp_path: Path) -> None:
    write_parent(SHAPES["llama-8b"], "curved", tmp_path)
    reader = ParentReader(tmp_path)
    assert sum(reader.num_weights.values()) == 32 * 218_103_808
    assert [profile.name for profile in reader.profiles(4)] == ["2", "3", "4"]
    # The layers of issue-sized replicas: 6.5 GiB of codes at width 8, and scales of 2 bytes per 128 weights.
    assert sum(plane_bytes(reader)) == sum(reader.num_weights.values())
    assert scale_bytes(reader) == sum(reader.num_weights.values()) // 64


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_peer_is_packed_integers_or_unquantized(tmp_path: Path, bits: int) -> None:
    write_peer(SHAPES["tiny"], bits, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if bits == 16:
        assert "quantization_config" not in config
    else:
        assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == bits


def test_a_mix_takes_turns() -> None:
    assert precisions("mix48") == ["4", "8"]
    assert precisions("3") == ["3"]


def test_times_are_differences_so_that_constant_costs_drop_out() -> None:
    def generate(count: int, prompt_len: int, tokens: int) -> float:
        return 7.0 + count * prompt_len / 1000 + tokens * 0.005

    assert decode_ms(generate, PLAN, 8) == pytest.approx(5.0)
    assert prefill_tokens_per_s(generate, PLAN) == pytest.approx(1000)


def test_one_engine_serves_all_widths_and_captures_the_batches_measured() -> None:
    options = engine_options(PLAN)
    assert ReplicaOptions.from_additional_config(options["additional_config"]).max_width == 8
    assert options["compilation_config"] == {"cudagraph_capture_sizes": [1, 8]}
    assert "worker_cls" not in engine_options(Plan(**{**PLAN.__dict__, "variant": "bf16"}))


def row(name: str, times: dict[str, float], prefill: float) -> dict[str, object]:
    return {"name": name, "decode_ms": times, "prefill_tokens_per_s": prefill}


def test_a_ratio_is_against_the_best_rival_at_the_worst_batch() -> None:
    rows = [row("ours 4", {"1": 2.0, "8": 4.0}, 95), row("w4-machete", {"1": 3.0, "8": 5.0}, 90), row("bf16", {"1": 6.0}, 100)]
    rows.append(row("w4-marlin", {"1": 2.6, "8": 6.0}, 50))
    found = report.rows([{"rows": rows}])
    decode = report.TARGETS[0]
    prefill = next(target for target in report.TARGETS if target.row == "ours 4" and target.batches is None)
    assert decode.row == "ours 4"
    assert report.speed_ratio(found, decode) == pytest.approx(1.25)  # 5.0 / 4.0 at batch 8; 1.3 at batch 1
    assert report.speed_ratio(found, prefill) == pytest.approx(0.95)
    assert report.speed_ratio(report.rows([{"rows": rows[1:]}]), decode) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variants", "w5"], "ours, ours-common-graphs, bf16, w4-machete"),
        (["--widths", "5"], "use one of 2, 3, 4, 6, 8"),
        (["--batches", "1,x"], "--batches has 'x'"),
        (["--max-model-len", "100"], "raise it"),
        (["--alone", "4096"], "have up to 4097 tokens"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.engine
def test_engines_are_measured_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    short = ["--tokens", "16", "--prompt-len", "8", "--prefill-len", "32", "--prefill-prompts", "2", "--max-model-len", "128"]
    short += ["--alone", "16,32"]
    options = ["--shape", "tiny", "--eager", "--batches", "2", "--widths", "4,mix48", "--repeats", "1", "--profile", *short]
    assert main(["--out", str(tmp_path), "--variants", "ours,bf16", "--together", *options]) == 0
    # Started before either was measured, and measured in order.
    written = [(tmp_path / name).stat().st_mtime for name in ("bf16.plan.json", "ours.json", "bf16.json")]
    assert written == sorted(written)
    assert main(["--out", str(tmp_path), "--variants", "bf16", "--together", *options]) == 0
    assert (tmp_path / "report.png").stat().st_size > 0
    results = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for result in results for row in result["rows"]] == ["ours 4", "ours mix48", "bf16"]
    assert "| ours mix48 |" in (tmp_path / "report.md").read_text()
    assert "| 16 tokens ms | 32 tokens ms |" in (tmp_path / "report.md").read_text()
    assert all(time > 0 for result in results for row in result["rows"] for time in row["alone_ms"].values())
    # The report is of all engines that were measured alike, whichever run did it.
    said = capsys.readouterr().out
    assert "ours 4, batch 2:" in said
    assert "aten::" in said
    assert all(us > 0 for result in results for row in result["rows"] for us, _ in list(row["kernels"]["2"].values())[:3])
