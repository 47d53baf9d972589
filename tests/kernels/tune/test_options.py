import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from matgptq_vllm import cli
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.kernels.tune import cli as tune_cli
from matgptq_vllm.kernels.tune.cli import add_verbs, options_from
from matgptq_vllm.kernels.tune.options import TuneOptions, parse_shapes


def parsed(*arguments: str) -> TuneOptions:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers())
    return options_from(parser.parse_args(["tune", *arguments]))


def test_the_defaults_measure_every_class_of_widths_and_m_up_to_512():
    assert parsed("--shapes", "896x4864") == TuneOptions(shapes=((896, 4864),))
    assert TuneOptions(shapes=((1, 1),)).ms == (8, 16, 32, 64, 128, 256, 512)


def test_every_option_arrives():
    options = parsed(
        *("--shapes", "128x256", "--group-size", "-1", "--widths", "4,several", "--m", "8, 64", "--seconds", "30"),
        *("--out", "t.json", "--workers", "3"),
    )
    assert options == TuneOptions(((128, 256),), -1, ("4", "several"), (8, 64), 30.0, Path("t.json"), 3)


def test_shapes_are_pairs_and_names_of_models_each_once():
    llama = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert parse_shapes("llama-3.1-8b, 4096x4096,896x896") == (*llama, (896, 896))


@pytest.mark.parametrize("text", ["", "4096", "4096x", "0x5", "4096x4096,", "4096*4096", "llama", "-1x5", "1x99999999"])
def test_what_is_no_shape_is_refused(text: str):
    with pytest.raises(InputError, match="is neither OUTPUTSxINPUTS, as 4096x14336, nor a known model: llama"):
        parse_shapes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no shape to measure; name a parent by --model"),
        (["--group-size", "100"], "--group-size 100 is not supported; use one of 32, 64, 128, -1"),
        (["--group-size", "x"], "--group-size 'x' is not a number"),
        (["--widths", "4,5"], "--widths '5' is not supported; use some of several, 2, 3, 4, 6, 8"),
        (["--m", "8,12"], "--m 12 is not supported; use some of 8, 16"),
        (["--m", "8,x"], "--m '8,x' is not a list of numbers"),
        (["--m", "4"], "--m 4 is not supported"),
        (["--seconds", "0"], "--seconds 0.0 is not supported; use a positive number"),
        (["--seconds", "nan"], "--seconds nan is not supported"),
        (["--workers", "-1"], "--workers -1 is not supported; use a whole number, 0 to 64"),
        (["--workers", "1.5"], "--workers '1.5' is not a number"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parsed(*(["--shapes", "128x128"] if arguments else []), *arguments)


def test_a_parents_products_are_those_that_vllm_runs(monkeypatch: pytest.MonkeyPatch):
    sizes = {"self_attn": {"q_proj": (896, 896), "k_proj": (128, 896), "v_proj": (128, 896), "o_proj": (896, 896)}}
    sizes["mlp"] = {"gate_proj": (4864, 896), "up_proj": (4864, 896), "down_proj": (896, 4864)}
    layers = {
        f"model.layers.{block}.{part}.{name}": shape
        for block in range(3)
        for part, names in sizes.items()
        for name, shape in names.items()
    }
    parent = SimpleNamespace(layers=layers, spec=SimpleNamespace(group_size=64))
    monkeypatch.setattr(tune_cli, "ParentSummary", lambda directory: parent)
    options = parsed("--model", "parent")
    assert options.shapes == ((1152, 896), (896, 896), (9728, 896), (896, 4864))
    assert options.group_size == 64
    assert parsed("--model", "parent", "--shapes", "8x32,896x896", "--group-size", "32") == TuneOptions(
        ((8, 32), (896, 896), (1152, 896), (9728, 896), (896, 4864)), 32
    )


def test_without_a_gpu_the_command_refuses_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["tune", "--shapes", "128x128", "--out", str(tmp_path / "t.json")]) == 2
    captured = capsys.readouterr()
    assert "error: no CUDA GPU is visible to torch" in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())
