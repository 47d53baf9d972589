"""The block loop against whole models: what rounding is told about a layer's inputs is what those models give it."""

import copy
from dataclasses import replace

import pytest
import torch

from calibrate import group_rounding
from calibrate.clock import PhaseClock
from calibrate.evaluate.sliced_model import load_sliced_model
from calibrate.model import find_blocks, load_config, load_model, skeleton
from calibrate.pipeline import Calibration, round_blocks
from calibrate.ranks import Ranks
from calibrate.run import calibration_windows, rounding_settings, run_calibration
from calibrate.weights_source import SafetensorsSource

CPU = torch.device("cpu")


def inputs_of_layers(model, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer -> float32 [tokens, K], what it is called with."""
    seen = {}
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            linear.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1)))
    model(windows, use_cache=False)
    return seen


@pytest.fixture
def told(monkeypatch) -> dict:
    """Name of a group's first layer -> the statistics that rounding was given; filled as a calibration runs."""
    given = {}
    round_layers = group_rounding.round_layers

    def noting(weight, statistics, settings, name):
        given[name] = copy.deepcopy(dict(statistics))  # rounding overwrites them
        return round_layers(weight, statistics, settings, name)

    monkeypatch.setattr(group_rounding, "round_layers", noting)
    return given


@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
def test_rounding_is_told_the_inputs_that_whole_models_give_each_layer(asymmetry, family_dir, tiny_options, told):
    options = tiny_options(model=family_dir, streams=(2, 4), asymmetry=asymmetry, num_samples=5)
    directory = run_calibration(options)
    windows = calibration_windows(options, load_config(family_dir))
    inputs = {
        None: inputs_of_layers(load_model(family_dir, torch.float32), windows),
        **{width: inputs_of_layers(load_sliced_model(directory, str(width)), windows) for width in options.streams},
    }
    assert [name.split(".", 3)[3] for name in told] == 2 * [
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
    ]  # fmt: skip
    original = inputs[None]
    for name, statistics in told.items():
        assert statistics.keys() == {None, 2, 4}
        for stream, found in statistics.items():
            rows = inputs[stream][name]
            assert found.num_tokens == windows.numel()
            close = {"rtol": 1e-3, "atol": 1e-3 * float(rows.square().mean())}
            torch.testing.assert_close(found.hessian, rows.t() @ rows / len(rows), **close)
            if asymmetry == 0 or stream is None:
                assert found.cross is None
            else:
                torch.testing.assert_close(found.cross, rows.t() @ original[name] / len(rows), **close)


def test_without_streams_all_widths_are_told_the_original_inputs(tiny_options, told):
    run_calibration(tiny_options(streams=()))
    assert all(statistics.keys() == {None} for statistics in told.values())


def test_bfloat16_gives_nearly_the_statistics_of_float32(tiny_options, told, tmp_path):
    run_calibration(tiny_options())
    expected = {name: statistics[None].hessian for name, statistics in told.items()}
    run_calibration(tiny_options(out=tmp_path / "other", compute_dtype="bfloat16"))
    name = "model.layers.1.mlp.down_proj"
    found = told[name][None].hessian
    assert found.dtype == torch.float32
    assert (found - expected[name]).norm() < 0.05 * expected[name].norm()
    assert not torch.equal(found, expected[name])


def test_while_a_layer_is_rounded_no_other_block_and_no_embedding_is_in_memory(tiny_options, monkeypatch):
    options = tiny_options(num_samples=4)
    model = skeleton(load_config(options.model))
    blocks = find_blocks(model)
    resident = []
    round_layers = group_rounding.round_layers

    def looking(weight, statistics, settings, name):
        large = [path for path, tensor in model.named_parameters() if tensor.ndim > 1 and tensor.device.type != "meta"]
        resident.append({path.rsplit(".", 3)[0] for path in large})
        return round_layers(weight, statistics, settings, name)

    monkeypatch.setattr(group_rounding, "round_layers", looking)
    calibration = Calibration(rounding_settings(options), (3,), torch.float32, Ranks(0, 1, CPU), PhaseClock(CPU))
    windows = calibration_windows(options, model.config)
    source = SafetensorsSource(options.model, model)
    list(round_blocks(model, blocks, source, windows, calibration, lambda _: None))
    assert resident == 4 * [{"model.layers.0"}] + 4 * [{"model.layers.1"}]
    assert not [path for path, tensor in model.named_parameters() if tensor.ndim > 1 and tensor.device.type != "meta"]


def test_finished_blocks_are_not_rounded_again_and_give_the_next_the_same_inputs(tiny_options, told):
    options = tiny_options(num_samples=4, asymmetry=1.0)
    model = skeleton(load_config(options.model))
    blocks = find_blocks(model)
    calibration = Calibration(rounding_settings(options), (3,), torch.float32, Ranks(0, 1, CPU), PhaseClock(CPU))
    arguments = (
        model,
        blocks,
        SafetensorsSource(options.model, model),
        calibration_windows(options, model.config),
        calibration,
    )
    whole = list(round_blocks(*arguments, lambda _: None))
    expected = dict(told)
    told.clear()
    earlier = {0: replace(whole[0], seconds=-1.0)}
    again = list(round_blocks(*arguments, earlier.get))
    assert again[0] is earlier[0]
    assert told.keys() == {name for name in expected if name.startswith("model.layers.1.")}
    for name, statistics in told.items():
        for stream, found in statistics.items():
            assert torch.equal(found.hessian, expected[name][stream].hessian)
    for layer, other in zip(again[1].layers, whole[1].layers, strict=True):
        assert torch.equal(layer.codes, other.codes)
        assert layer.errors == other.errors
