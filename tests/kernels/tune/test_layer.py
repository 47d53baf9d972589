"""What tuning runs on a GPU, run in Triton's interpreter: everything but the clock. On a machine with a GPU, that too."""

import json
from collections.abc import Callable

import pytest
import torch

ON_GPU = torch.cuda.is_available()

RUN = """
import json, sys, time
import torch
import matgptq_vllm.kernels.tune.layer as module
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.tune.compiling import Compiler
from matgptq_vllm.kernels.tune.layer import RandomLayer
from matgptq_vllm.kernels.tuning import Problem

def call_each_once(self, calls, x, bytes_read, seconds):
    shapes.update((key, [list(call(x).shape) for call in several]) for key, several in calls.items())
    return {key: float(len(several)) for key, several in calls.items()}

if __name__ == "__main__":
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        RandomLayer._time = call_each_once
        module.num_copies = lambda bytes_read: 2
    shapes = {}
    right = module.sliced_gemm
    module.sliced_gemm = lambda *arguments: right(*arguments) * (1.1 if wrong in arguments else 1.0)
    good, other, bad = Config(8, 32, 4, 1), Config(16, 64, 2, 2), Config(8, 96, 4, 1)
    wrong = Config(8, 64, 8, 1)
    alone, several = Problem(8, 65, 96, (3,), 32), Problem(8, 65, 96, (4, 8), 32)
    lines = []
    compiler = Compiler(1, device, lines.append)
    wanted = [(alone, good), (alone, bad)]
    compiled = compiler.compile(wanted, time.monotonic() + 200)
    again = compiler.compile(wanted, 0.0)
    layer = RandomLayer(65, 96, 32, 3, 8, device)
    results = {
        "compiled": [pair in compiled for pair in wanted],
        "again": [pair in again for pair in wanted],
        "too_late": len(compiler.compile([(several, good)], 0.0)),
        "lines": lines,
        "alone": sorted(layer.fused(alone, [good, wrong, other], 1.0).items(), key=lambda item: item[0].block_n),
        "shapes": dict(shapes),
        "several": sorted(layer.fused(several, [good], 1.0).items(), key=str),
        "crossing": layer.crossing(several, good, 5, 1.0),
        "crossing_shapes": dict(shapes),
    }
    for key in ("alone", "several"):
        results[key] = [[(config.block_n, config.num_warps), us] for config, us in results[key]]
    json.dump(results, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]) -> dict:
    directory = tmp_path_factory.mktemp("tune")
    # The process that compiles imports the script again, so that it has to be a file.
    (directory / "script.py").write_text(RUN)
    run_kernels(directory / "script.py", directory / "results.json")
    return json.loads((directory / "results.json").read_text())


def test_another_process_compiles_and_a_configuration_that_cannot_run_is_left_out(results: dict):
    assert results["compiled"] == [True, False]
    assert results["lines"][-1] == "compiled 2 of 2 kernels"


def test_what_is_compiled_is_remembered_and_nothing_is_begun_when_the_time_is_over(results: dict):
    assert results["again"] == [True, False]
    assert results["too_late"] == 0


def test_configurations_that_run_and_agree_are_timed(results: dict):
    assert [config for config, _ in results["alone"]] == [[32, 4], [64, 2]]
    assert all(us > 0 for _, us in results["alone"] + results["several"])


def test_both_paths_are_timed_at_any_m(results: dict):
    fused, dense = results["crossing"]
    assert fused > 0
    assert dense > 0


if not ON_GPU:

    def test_every_copy_is_called_and_a_replica_of_several_widths_with_each_kind_of_rows(results: dict):
        assert [us for _, us in results["alone"]] == [2.0, 2.0]
        assert [us for _, us in results["several"]] == [4.0]
        assert results["shapes"] == {"0": [[8, 65]] * 2, "2": [[8, 65]] * 2}
        assert results["crossing_shapes"]["dense"] == results["crossing_shapes"]["fused"] == [[5, 65]] * 2
