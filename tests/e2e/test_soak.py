"""The soak test, for a few seconds: what it does runs, and what it checks holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .replica_server import ROOT, engine_environment

pytestmark = pytest.mark.engine


def test_a_short_soak_finds_no_leak(profiled_parent: Path, calibration_text: Path, tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "num_gpu_blocks_override": 48, "block_size": 32}
    options |= {"max_num_seqs": 32, "gpu_memory_utilization": 0.2}
    command = [
        *(sys.executable, "-m", "loadtests.soak", str(profiled_parent), "--text", str(calibration_text)),
        *("--minutes", "0.15", "--interval", "0.5", "--in-flight", "32", "--out", str(report)),
        *(argument for name, value in options.items() for argument in ("--engine", f"{name}={json.dumps(value)}")),
    ]
    environment = {**engine_environment("v1"), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["problems"] == []
    assert min(found["finished"], found["cancelled"], found["preemptions"]) > 0
