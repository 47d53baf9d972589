import json

import pytest

from calibrate.inspect import as_text, describe_parent
from calibrate.options import InspectOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.errors import FormatError

LOG = "calibration_log.json"


@pytest.fixture
def parent(tiny_options):
    directory = run_calibration(tiny_options(method="rtn", text=None))
    log = json.loads((directory / LOG).read_text())
    for index, layer in enumerate(log["layers"].values()):
        layer["errors"] = {"2": 0.1 + index / 100, "8": 0.001 - index / 1e5}
    (directory / LOG).write_text(json.dumps(log))
    return directory


def test_layers_are_sorted_by_error_and_the_worst_of_each_width_is_marked(parent):
    lines = as_text(describe_parent(InspectOptions(parent))).splitlines()
    assert "14 quantized layers" in lines[2]
    header, *rows = lines[3:18]
    assert header.split() == ["layer", "outputs", "x", "inputs", "2", "bits", "8", "bits"]
    assert rows[0].split() == ["model.layers.1.mlp.down_proj", "40", "x", "72", "0.23*", "0.00087"]
    assert rows[-1].split() == ["model.layers.0.self_attn.q_proj", "64", "x", "40", "0.1", "0.001*"]
    assert sum(line.count("*") for line in rows) == 2


def test_json_has_the_errors_by_layer_and_width(parent):
    description = describe_parent(InspectOptions(parent))
    assert description["errors"].keys() == description["layers"].keys()
    assert description["errors"]["model.layers.0.self_attn.q_proj"] == {"2": 0.1, "8": 0.001}
    assert description["verified_tensors"] is None


@pytest.mark.parametrize("change", ["no log", "not measured"])
def test_without_errors_the_layers_stand_in_checkpoint_order(parent, change):
    if change == "no log":
        (parent / LOG).unlink()
    else:
        log = json.loads((parent / LOG).read_text())
        for layer in log["layers"].values():
            layer["errors"] = {}
        (parent / LOG).write_text(json.dumps(log))
    description = describe_parent(InspectOptions(parent))
    assert description["errors"] == {}
    lines = as_text(description).splitlines()
    assert lines[2] == "14 quantized layers (outputs x inputs); no errors were measured"
    assert [line.split()[0] for line in lines[3:17]] == list(description["layers"])


def test_a_log_that_is_none_is_refused(parent):
    (parent / LOG).write_text('{"layers": [1]}')
    with pytest.raises(FormatError, match=r"calibration_log\.json: not a calibration log"):
        describe_parent(InspectOptions(parent))
