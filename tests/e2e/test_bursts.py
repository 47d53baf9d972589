"""loadtests.bursts against a real server: the same trace at a fixed precision and under a budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .replica_server import MODEL_NAME, ROOT, ReplicaServer, engine_environment

pytestmark = pytest.mark.engine


def test_a_trace_is_replayed_per_policy_and_reported(v1_server: ReplicaServer, profiled_parent: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "loadtests.bursts", v1_server.url, "--tokenizer", str(profiled_parent), "--model", MODEL_NAME),
        *("--budget-ms", "60000", "--policies", "3,auto", "--seconds", "4", "--rate", "2", "--calm-s", "2", "--burst-s", "1"),
        *("--input-len", "20", "--output-len", "5", "--out", str(tmp_path)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=engine_environment("v1"), cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    heading, *rows = run.stdout.splitlines()
    assert "mean width" in heading
    report = json.loads((tmp_path / "report.json").read_text())
    fixed, auto = report["policies"]
    assert [row.split()[0] for row in rows] == ["3", "auto"]
    assert fixed["requests"] == auto["requests"] == len((tmp_path / "trace.jsonl").read_text().splitlines())
    assert (fixed["failed"], fixed["met"], fixed["mean_width"]) == (0, 1.0, 3.0)
    # A budget of a minute per token holds at every width.
    assert (auto["failed"], auto["met"], auto["mean_width"]) == (0, 1.0, 8.0)
