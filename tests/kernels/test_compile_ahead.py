"""kernels.compile_ahead: which products are called, in processes, once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RUN = """
import json, os, sys, torch
from matgptq_vllm.kernels import compile_ahead, tuning
from matgptq_vllm.kernels.compile_ahead import Call, LayerKind
from matgptq_vllm.kernels.wide_config import wide_runs

device = torch.device(sys.argv[1])
os.environ[compile_ahead.DIRECTORY_VARIABLE] = sys.argv[3]
small = LayerKind(40, 136, (2, 4), -1, "curved", "bfloat16", "bfloat16")
other = LayerKind(24, 128, (3,), 128, "round", "float16", "float32")
found = {}

wanted = compile_ahead.calls([small, other, small], device)
dense_from = tuning.dense_from(small.n, small.k, device)
of_small = [call for call in wanted if call.kind == small]
found["each kind once"] = len(of_small) == len(set(of_small))
fewer = {rows for rows in compile_ahead.ROWS if rows < dense_from}
more = {rows for rows in compile_ahead.MORE_ROWS if rows >= dense_from} if wide_runs(device) else set()
found["every range of rows"] = {call.rows for call in of_small} == {*fewer, dense_from, *more}
found["every width of many rows"] = {call.width for call in of_small if call.rows == dense_from} == {2, 4}
few = LayerKind(40, 136, (2,), -1, "curved", "bfloat16", "bfloat16", most_rows=64)
found["no more rows than there are"] = [call.rows for call in compile_ahead.calls([few], device)] == [
    rows for rows in compile_ahead.ROWS if rows <= 64
]
found["captured only with several widths"] = {call.kind for call in wanted if call.captured} == {small}

# Fewer rows, for the interpreter.
compile_ahead.ROWS = (8, 16)
tuning.dense_from = lambda n, k, device: 17
said = []
compile_ahead.compile_ahead([small, other], device, said.append)
found["said what it does"] = len(said) == 2 and "compiling kernels" in said[0] and "compiled in" in said[1]
compile_ahead.compile_ahead([small, other], device, said.append)
found["compiles nothing the second time"] = len(said) == 2
third = LayerKind(24, 128, (3,), 64, "round", "float16", "float32")
compile_ahead.compile_ahead([small, third], device, said.append)
found["compiles only what is new"] = len(said) == 4 and "for 3 products" in said[2]
called = []
compile_ahead.call_once = lambda call, device: called.append(call)
compile_ahead.compile_ahead([small, other], device, said.append)
found["calls all in this process"] = called == compile_ahead.calls([small, other], device)
broken = LayerKind(40, 136, (2, 4), 7, "curved", "bfloat16", "bfloat16")
compile_ahead.compile_ahead([broken], device, said.append)
found["a failure is said, and tried again"] = "failed" in said[-1]
count = len(said)
compile_ahead.compile_ahead([broken], device, said.append)
found["not remembered as done"] = len(said) == count + 2
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]) -> dict[str, bool]:
    """What holds."""
    folder: Path = tmp_path_factory.mktemp("compile_ahead")
    run_kernels(RUN, "cuda:0" if torch.cuda.is_available() else "cpu", folder / "found.json", folder / "cache")
    result: dict[str, bool] = json.loads((folder / "found.json").read_text())
    return result


def test_every_kernel_that_steps_run_is_called_once_and_only_once_ever(found: dict[str, bool]) -> None:
    assert len(found) == 11
    assert all(found.values()), found
