"""Every kernel as a replica calls it, on a GPU: rules, groups, widths, shapes and numbers of rows of real models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("products_on_gpu.py")
ROWS = "1,2,3,5,7,16,17,33,64,100,257,700"
ALL = "2,3,4,6,8"


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; tests/kernels/test_gemm has these products in the interpreter"
)
@pytest.mark.parametrize(
    ("rule", "group", "dtype", "widths", "shapes"),
    [
        # N and K that fit no tile, and those of Qwen2, Llama, ChatGLM and Mistral models.
        ("curved", 128, "bfloat16", ALL, "4096x4096,130x896,4608x13696"),
        ("curved", 64, "bfloat16", "2,4,8", "1000x4864,4096x11008"),
        ("curved", 32, "float16", "3,4", "520x8960,4096x14336"),
        ("curved", -1, "bfloat16", "2,3", "896x4864,2056x4096"),
        ("nested", 128, "float16", ALL, "4096x14336,72x8960"),
        ("nested", 64, "bfloat16", "2,8", "152x896,4096x13696"),
        ("nested", 32, "bfloat16", "4,6,8", "1032x11008"),
        ("nested", -1, "float16", "2,3,6", "4096x4096,896x896"),
        ("curved", 128, "bfloat16", "2", "4864x896,4096x4096"),
        ("curved", 128, "bfloat16", "3", "4096x14336"),
        ("curved", 128, "float16", "4", "8960x4096,130x4864"),
        ("nested", 128, "bfloat16", "8", "4096x11008,4608x896"),
    ],
)  # fmt: skip
def test_rows_are_within_a_hundredth_and_lower_planes_are_not_read(
    rule: str, group: int, dtype: str, widths: str, shapes: str
) -> None:
    command = [sys.executable, str(SCRIPT), rule, str(group), dtype, widths, ROWS, shapes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {case: error for case, error in found.items() if not error < 1e-2} == {}
