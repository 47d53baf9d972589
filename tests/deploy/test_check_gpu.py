"""deploy/release/check_gpu.sh: what it says where it cannot run; what it runs are other tests and commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "release" / "check_gpu.sh"


def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_without_arguments_it_says_what_it_needs() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (2, "usage: check_gpu.sh PARENT TEXT OUT\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would run for half an hour")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path, tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch finds no GPU" in done.stderr
