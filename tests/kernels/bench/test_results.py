import json
from dataclasses import replace

import pytest

from matgptq_vllm.kernels.bench.results import Failure, as_json, layer_sums

LAYERS = ["qkv", "o", "gate_up", "down"]


def test_times_and_bytes_are_summed_over_the_layers(results_of):
    times, read = layer_sums(results_of({("bf16", 1): 125.0, ("width-4", 16): 55.0}), "llama-3.1-8b", LAYERS)
    assert times == {("bf16", 1): pytest.approx(125.0), ("width-4", 16): pytest.approx(55.0)}
    assert read["bf16", 1] == 218_103_808 / 2


def test_a_sum_without_one_of_its_layers_is_no_sum(results_of):
    results = results_of({("bf16", 1): 125.0, ("width-4", 1): 55.0})
    cells = [cell for cell in results.cells if (cell.competitor, cell.layer) != ("width-4", "o")]
    times, read = layer_sums(replace(results, cells=cells), "llama-3.1-8b", LAYERS)
    assert list(times) == list(read) == [("bf16", 1)]


def test_json_holds_every_cell_and_failure(results_of):
    failure = Failure("llama-3.1-8b", "o", "machete-w4", None, "no such operator")
    loaded = json.loads(as_json(results_of({("bf16", 1): 125.0}, (failure,))))
    assert len(loaded["cells"]) == 4
    assert loaded["cells"][0]["layer"] == "qkv"
    assert loaded["failures"][0]["reason"] == "no such operator"
    assert loaded["device"]["name"] == "NVIDIA H200"


def test_the_data_sheet_is_known_by_the_drivers_name(results_of):
    assert results_of({}).device.datasheet_bytes_per_s == 4.8e12
    assert results_of({}, name="Some other GPU").device.datasheet_bytes_per_s is None
