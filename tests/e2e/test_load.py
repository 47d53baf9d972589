"""loadtests.widths against a real server: every request is answered, at the precision it was sent for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .replica_server import MODEL_NAME, ROOT, ReplicaServer, engine_environment

pytestmark = pytest.mark.engine


def test_a_load_test_reports_every_precision(v1_server: ReplicaServer, profiled_parent: Path, tmp_path: Path) -> None:
    def generated() -> dict[str, int]:
        with v1_server.client() as client:
            return client.get("/v1/precisions").json()["workers"][0]["tokens"]

    before = generated()
    command = [
        *(sys.executable, "-m", "loadtests.widths", v1_server.url, "--tokenizer", str(profiled_parent), "--model", MODEL_NAME),
        *("--precisions", "3,mix-depth", "--num-prompts", "6", "--concurrency", "3", "--input-len", "20", "--output-len", "5"),
        *("--out", str(tmp_path)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=engine_environment("v1"), cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    heading, *rows = run.stdout.splitlines()
    assert "tokens/s" in heading
    assert [row.split()[0] for row in rows] == ["3", "mix-depth"]
    gained = {name: count - before[name] for name, count in generated().items()}
    # Each request computes its prompt and all of its answer but the last token; vLLM adds a trial request of its own.
    for precision in ("3", "mix-depth"):
        assert gained[precision] >= 6 * (20 + 5 - 1)
        result = json.loads((tmp_path / f"precision-{precision}.json").read_text())
        assert (result["completed"], result["failed"]) == (6, 0)
    assert all(gained[other] == 0 for other in ("2", "4", "6", "mix-kind"))


def test_mixed_batches_answer_as_single_requests_do(v1_server: ReplicaServer, evaluation_text: Path, tmp_path: Path) -> None:
    def agreement(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loadtests.agreement", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=engine_environment("v1"), cwd=ROOT, timeout=300)

    for name, concurrency in (("mixed", "12"), ("single", "1")):
        options = ["--text", str(evaluation_text), "--precisions", "2,4,mix-depth", "--num-prompts", "4", "--max-tokens", "8"]
        run = agreement(
            "record", v1_server.url, *options, "--concurrency", concurrency, "--out", str(tmp_path / f"{name}.json")
        )
        assert run.returncode == 0, run.stdout + run.stderr
    run = agreement("compare", str(tmp_path / "single.json"), str(tmp_path / "mixed.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of 12 answers are equal" in run.stdout
    answers = json.loads((tmp_path / "mixed.json").read_text())
    by_precision = {p: [a["tokens"] for a in answers if a["precision"] == p] for p in ("2", "4", "mix-depth")}
    assert by_precision["2"] != by_precision["4"] != by_precision["mix-depth"]
