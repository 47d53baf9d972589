"""On a GPU with CUDA graphs: the memory of dropped planes returns, graphs captured before read the planes that came back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .replica_server import ROOT, engine_environment

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_memory_returns_and_graphs_stay_right(profiled_parent: Path, runner: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "e2e" / "elastic_proof.py"), str(profiled_parent)]
    environment = engine_environment(runner)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
