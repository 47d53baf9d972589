"""The loop over layers, rows and competitors, with products, graphs and rounds that need no GPU."""

from collections.abc import Sequence

import pytest
import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.kernels.bench import measure
from matgptq_vllm.kernels.bench.competitors import Competitor, Problem, Workload
from matgptq_vllm.kernels.bench.options import parse_options
from matgptq_vllm.kernels.bench.shapes import GemmShape
from matgptq_vllm.kernels.bench.timing import Replay

SHAPES = (GemmShape("qkv", 24, 16), GemmShape("down", 8, 32))


class Bench:
    """A measurement in which every competitor multiplies with the same weights, except where a test plants a fault."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds_per_round = 0.0
        self.rounds: list[Sequence[str]] = []
        self.unbuildable: set[str] = set()
        self.wrong: set[str] = set()
        self.device_error: str | None = None

    def workload(self, competitor: Competitor, problem: Problem) -> Workload:
        if competitor.key in self.unbuildable:
            raise UnsupportedError(f"{competitor.key} is not here\nand more of the same")
        weight = torch.randn(problem.shape.n, problem.shape.k).bfloat16()
        factor = 1.1 if competitor.key in self.wrong else 1.0
        return Workload([lambda x: factor * (x @ weight.T)], 1000, problem.x.float() @ weight.float().T)

    def round(self, replays: dict[str, Replay]) -> dict[str, float]:
        self.now += self.seconds_per_round
        self.rounds.append(list(replays))
        return {key: 10.0 + index for index, key in enumerate(replays)}

    def synchronize(self, device: torch.device) -> None:
        if self.device_error:
            raise RuntimeError(self.device_error)

    def run(self, *arguments: str) -> measure.Measurement:
        options = parse_options(["--model", "llama-3.1-8b", *arguments])
        measurement = measure.Measurement(options, torch.device("cpu"), clock=lambda: self.now)
        measurement.model("llama-3.1-8b")
        return measurement


@pytest.fixture
def bench(monkeypatch) -> Bench:
    torch.manual_seed(0)
    bench = Bench()

    class Copies:
        def __init__(self, problem: Problem, competitors: Sequence[Competitor]) -> None:
            self._problem = problem

        def workload(self, competitor: Competitor) -> Workload:
            return bench.workload(competitor, self._problem)

    monkeypatch.setattr(measure, "MODELS", {"llama-3.1-8b": SHAPES})
    monkeypatch.setattr(measure, "ParentCopies", Copies)
    monkeypatch.setattr(measure.peers, "build", bench.workload)
    monkeypatch.setattr(measure, "capture", lambda calls, x, count, stream: Replay(lambda: None, count))
    monkeypatch.setattr(measure, "time_round", bench.round)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", bench.synchronize)
    return bench


def test_every_competitor_gets_a_cell_per_layer_and_m(bench: Bench, capsys):
    measurement = bench.run("--only", "bf16,width-4", "--m", "1,3", "--rounds", "4")
    assert [(cell.layer, cell.m, cell.competitor, cell.us) for cell in measurement.cells] == [
        (layer, m, key, us) for layer in ("qkv", "down") for m in (1, 3) for key, us in (("bf16", 10.0), ("width-4", 11.0))
    ]
    assert {cell.rounds for cell in measurement.cells} == {4}
    assert all(0 < cell.error < 0.01 for cell in measurement.cells)
    assert measurement.failures == []
    assert capsys.readouterr().err.splitlines() == [
        "llama-3.1-8b qkv 24x16: 2 competitors, 2 values of M, 4 rounds or more in 0.0 s, 100 s left",
        "llama-3.1-8b down 8x32: 2 competitors, 2 values of M, 4 rounds or more in 0.0 s, 100 s left",
    ]


def test_competitors_take_turns(bench: Bench):
    bench.run("--only", "bf16,width-4,width-2", "--m", "1", "--rounds", "3")
    # One round to warm up and three that count, for both layers.
    assert bench.rounds == [["bf16", "width-4", "width-2"]] * 8


def test_a_mixture_is_not_timed_on_one_row(bench: Bench):
    measurement = bench.run("--only", "width-8,mixed-4-8", "--m", "1,2")
    assert {(cell.competitor, cell.m) for cell in measurement.cells} == {("width-8", 1), ("width-8", 2), ("mixed-4-8", 2)}
    assert measurement.failures == []


def test_who_cannot_be_built_is_reported_and_the_others_are_timed(bench: Bench):
    bench.unbuildable = {"machete-w4"}
    measurement = bench.run("--only", "machete-w4,width-4", "--m", "1,16")
    assert {cell.competitor for cell in measurement.cells} == {"width-4"}
    assert [(f.layer, f.competitor, f.m, f.reason) for f in measurement.failures] == [
        ("qkv", "machete-w4", None, "machete-w4 is not here"),
        ("down", "machete-w4", None, "machete-w4 is not here"),
    ]


def test_who_computes_something_else_is_not_timed(bench: Bench):
    bench.wrong = {"marlin-w4"}
    measurement = bench.run("--only", "marlin-w4,width-4", "--m", "5")
    assert {cell.competitor for cell in measurement.cells} == {"width-4"}
    assert "its output is wrong, by 0.1" in measurement.failures[0].reason


def test_rounds_and_then_cells_are_left_out_to_keep_to_the_time(bench: Bench):
    bench.seconds_per_round = 2.0
    measurement = bench.run("--only", "width-4", "--m", "1,2,4", "--rounds", "50", "--seconds", "60")
    assert max(cell.rounds for cell in measurement.cells) < 10
    assert len(measurement.cells) == 6
    bench.now, bench.seconds_per_round = 0.0, 20.0
    measurement = bench.run("--only", "width-4", "--m", "1,2,4", "--seconds", "60")
    assert [(cell.layer, cell.m, cell.rounds) for cell in measurement.cells] == [("qkv", 1, 3)]
    assert {failure.reason for failure in measurement.failures} == {measure.OUT_OF_TIME}
    assert len(measurement.failures) == 5


def test_a_gpu_that_fails_ends_the_measurement_and_names_the_competitor(bench: Bench):
    bench.unbuildable, bench.device_error = {"width-3"}, "an illegal memory access was encountered"
    with pytest.raises(measure.DeviceLostError, match=r"the GPU failed in width-3 on llama-3.1-8b qkv"):
        bench.run("--only", "width-4,width-3", "--m", "1")
