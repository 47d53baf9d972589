import argparse
import json
import re
import shutil

import pytest
import torch

from calibrate.cli import add_verbs
from calibrate.evaluate.sliced_model import layer_values, load_sliced_model
from calibrate.exchange.export_plan import describe_plan
from calibrate.exchange.export_run import run_export, set_exported
from calibrate.exchange.import_run import run_import
from calibrate.exchange.options import ExportOptions, ImportOptions
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.folder_swap import partial_directory
from matgptq_vllm.core.profile import Profile

from .conftest import published_values, read_weights

FORMATS = ("compressed-tensors", "gptq")


@pytest.fixture(scope="module")
def nested_parent(plain_dir, text_file, tmp_path_factory):
    """A parent of rule nested and one profile. Read only."""
    out = tmp_path_factory.mktemp("nested") / "parent"
    run_calibration(CalibrateOptions(plain_dir, out, text_file, num_samples=8, seq_len=32, group_size=32, slice_rule="nested"))
    write_profiles(out, [Profile("mix", {name: 2 if "layers.0" in name else 3 for name in ParentReader(out).layers})])
    return out


@pytest.fixture
def round_parent(published_dir, tmp_path):
    run_import(ImportOptions(published_dir, tmp_path / "imported"))
    return tmp_path / "imported"


def exported(parent, out, precision="4", **options):
    return run_export(ExportOptions(parent, out, profile=precision, **options))


def values_in(parent, out, format, bits):
    """Weights of the exported checkpoint's layers, by name."""
    model = load_sliced_model(parent, "8")
    layers = list(ParentReader(parent).layers)
    set_exported(model, out, layers, format, bits)
    return {name: model.get_submodule(name).weight for name in layers}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("width", "bits"), [(4, 4), (3, 4), (2, 4), (4, 8), (6, 8), (8, 8)])
def test_an_imported_slice_is_exported_bit_for_bit(published_dir, round_parent, tmp_path, format, width, bits):
    out = tmp_path / "out"
    report = exported(round_parent, out, str(width), format=format, bits=bits)
    assert (report.inexact_layers, report.slice_error, report.zero_points) == (0, 0, False)
    assert "exact: every weight is that of the slice" in report.as_text()
    weights = read_weights(published_dir)
    for name, values in values_in(round_parent, out, format, bits).items():
        assert torch.equal(values, published_values(weights[f"{name}.qweight"], weights[f"{name}.scales"], width)), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("precision", "bits"), [("2", None), ("3", None), ("mix", None), ("4", 8), ("6", None)])
def test_nested_slices_are_exact_where_the_bits_have_one_to_spare(nested_parent, tmp_path, format, precision, bits):
    report = exported(nested_parent, tmp_path / "out", precision, format=format, bits=bits)
    assert report.inexact_layers == 0
    reader = ParentReader(nested_parent)
    profile = reader.profile(precision)
    for name, values in values_in(nested_parent, tmp_path / "out", format, report.bits).items():
        assert torch.equal(values, layer_values(reader, name, profile.widths[name])), name


@pytest.mark.parametrize("format", FORMATS)
def test_a_nested_slice_of_as_many_bits_is_rounded_and_the_loss_reported(nested_parent, text_file, tmp_path, format):
    report = exported(nested_parent, tmp_path / "out", format=format, text=text_file, seq_len=32, limit_windows=6)
    assert (report.bits, report.inexact_layers, report.exact_bits) == (4, 14, 8)
    assert report.zero_points == (format == "compressed-tensors")
    reader = ParentReader(nested_parent)
    of_slice, of_parent = [], []
    for name, values in values_in(nested_parent, tmp_path / "out", format, 4).items():
        four, eight = layer_values(reader, name, 4), layer_values(reader, name, 8)
        of_slice.append(float((values - four).square().sum() / four.square().sum()))
        of_parent.append(float((values - eight).square().sum() / eight.square().sum()))
    assert report.slice_error == pytest.approx(sum(of_slice) / 14, rel=1e-4)
    assert report.parent_error == pytest.approx(sum(of_parent) / 14, rel=1e-4)
    assert list(report.errors.values()) == pytest.approx(of_slice, rel=1e-4)
    # As near to the parent as the slice is: nothing but the choice of the grid is lost.
    assert report.parent_error < 1.1 * report.slice_parent_error
    assert report.perplexity == pytest.approx(report.slice_perplexity, rel=0.2)
    text = report.as_text()
    assert "not exact: 4 bits cannot hold the slice of 14 layers" in text
    assert "--bits 8 holds this slice exactly" in text
    assert f"perplexity: {report.slice_perplexity:.3f} of the slice" in text


def test_the_fit_can_stay_with_the_slice(nested_parent, tmp_path):
    to_parent = exported(nested_parent, tmp_path / "a")
    to_slice = exported(nested_parent, tmp_path / "b", fit="slice")
    assert to_slice.slice_error < to_parent.slice_error
    assert to_slice.parent_error > to_parent.parent_error


def test_a_curved_slice_fits_no_even_grid_and_is_rounded(plain_dir, text_file, tmp_path):
    parent = tmp_path / "parent"
    run_calibration(CalibrateOptions(plain_dir, parent, text_file, num_samples=8, seq_len=32, group_size=32))
    report = exported(parent, tmp_path / "out", text=text_file, seq_len=32, limit_windows=6)
    assert (report.inexact_layers, report.exact_bits) == (14, None)
    assert 0 < report.slice_error < 0.1
    assert report.perplexity == pytest.approx(report.slice_perplexity, rel=0.2)


def test_eight_bits_of_nested_lose_little(nested_parent, tmp_path):
    report = exported(nested_parent, tmp_path / "out", "8", format="gptq")
    assert report.inexact_layers == 14
    assert report.exact_bits is None
    assert 0 < report.slice_error < 1e-4


def test_one_scale_per_channel_is_exported_as_such(make_published, tmp_path):
    source = make_published(group_size=-1)
    run_import(ImportOptions(source, tmp_path / "parent"))
    for format in FORMATS:
        report = exported(tmp_path / "parent", tmp_path / format, format=format)
        assert (report.group_size, report.inexact_layers) == (-1, 0)
    config = json.loads((tmp_path / FORMATS[0] / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["group_size"] == -1


def test_groups_shrink_where_the_parents_last_group_is_short(plain_dir, tmp_path):
    # 96 inputs are one group of 64 and half of one; three groups of 32 have the same scales.
    run_calibration(CalibrateOptions(plain_dir, tmp_path / "parent", method="rtn", group_size=64, slice_rule="round"))
    report = exported(tmp_path / "parent", tmp_path / "out")
    assert (report.group_size, report.inexact_layers) == (32, 0)


def test_the_rest_of_the_folder_comes_along(round_parent, tmp_path):
    out = tmp_path / "out"
    exported(round_parent, out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["hidden_size"] == 64
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "matgptq_export.json", "model-00001-of-00001.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    }
    weights = read_weights(out)
    assert all(torch.equal(weights[name], tensor) for name, tensor in ParentReader(round_parent).unquantized())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == weights.keys()
    assert (out / "model-00001-of-00001.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert json.loads((out / "matgptq_export.json").read_text())["inexact_layers"] == 0
    assert "All weights are exactly those of the slice" in (out / "README.md").read_text()


def test_large_models_are_written_in_shards(round_parent, tmp_path, monkeypatch):
    monkeypatch.setattr("calibrate.exchange.export_run.SHARD_BYTES", 40_000)
    exported(round_parent, tmp_path / "out", format="gptq")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert values_in(round_parent, tmp_path / "out", "gptq", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --width or --profile"),
        ({"width": 4, "profile": "4"}, "give either --width or --profile"),
        ({"width": 5}, "width 5 is not supported; use one of 2, 3, 4, 6, 8"),
        ({"width": 4, "bits": 3}, "bits 3 is not supported; use one of 4, 8"),
        ({"width": 4, "format": "awq"}, "format 'awq' is not supported; use one of compressed-tensors, gptq"),
        ({"width": 4, "fit": "best"}, "fit 'best' is not supported"),
        ({"width": 4, "seq_len": 1}, "seq_len is 1"),
        ({"width": 4, "limit_windows": 0}, "limit_windows is 0"),
        ({"profile": "mix-9"}, "has no profile 'mix-9'"),
        ({"width": 6, "bits": 4}, "has layers of width 6; 4 bits cannot hold them: use --bits 8"),
    ],
)
def test_options_that_fit_no_checkpoint_are_refused(nested_parent, tmp_path, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run_export(ExportOptions(nested_parent, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_ragged_groups_are_refused_with_a_way_out(llama_dir, tmp_path):
    run_calibration(CalibrateOptions(llama_dir, tmp_path / "parent", method="rtn", group_size=32))
    with pytest.raises(InputError, match=r"has 40 inputs; the formats need whole groups .* --group-size -1"):
        exported(tmp_path / "parent", tmp_path / "out")


def test_what_is_no_parent_or_a_damaged_one_is_refused_and_nothing_is_left(plain_dir, nested_parent, tmp_path):
    with pytest.raises(FormatError, match="not a parent"):
        exported(plain_dir, tmp_path / "out")
    damaged = tmp_path / "damaged"
    shutil.copytree(nested_parent, damaged)
    plane = damaged / "planes" / "plane4-00001-of-00001.safetensors"
    content = bytearray(plane.read_bytes())
    content[-1] ^= 1
    plane.write_bytes(content)
    with pytest.raises(FormatError, match="is not what calibration wrote"):
        exported(damaged, tmp_path / "out", "8")
    assert not (tmp_path / "out").exists()
    assert not partial_directory(tmp_path / "out").exists()


def test_an_export_is_replaced_only_when_asked(nested_parent, tmp_path):
    out = tmp_path / "out"
    exported(nested_parent, out, "2")
    with pytest.raises(InputError, match="pass --overwrite to replace it when the new slice checkpoint is whole"):
        exported(nested_parent, out, "3")
    assert json.loads((out / "matgptq_export.json").read_text())["precision"] == "2"
    exported(nested_parent, out, "3", overwrite=True)
    assert json.loads((out / "matgptq_export.json").read_text())["precision"] == "3"
    with pytest.raises(InputError, match="is not a slice checkpoint, so it is not replaced"):
        exported(nested_parent, nested_parent, overwrite=True)
    # Killed between the two renames of a replacement: the old export is there under its other name.
    out.rename(tmp_path / ".out.replaced")
    exported(nested_parent, tmp_path / "other")
    with pytest.raises(InputError, match="pass --overwrite"):
        exported(nested_parent, out)


def test_dry_run_describes_and_writes_nothing(nested_parent, tmp_path):
    text = describe_plan(ExportOptions(nested_parent, tmp_path / "out", width=6))
    assert text.startswith(
        f"would export precision 6 of {nested_parent} as compressed-tensors, 8 bits per weight, group size 32"
    )
    assert not (tmp_path / "out").exists()


def test_the_verbs_import_and_export_work_together(published_dir, text_file, tmp_path, capsys):
    def run(*arguments):
        parser = argparse.ArgumentParser()
        add_verbs(parser.add_subparsers(required=True))
        namespace = parser.parse_args([str(argument) for argument in arguments])
        assert namespace.run(namespace) == 0
        return capsys.readouterr().out

    parent, out = tmp_path / "parent", tmp_path / "out"
    assert run("import", published_dir, "--out", parent, "--dry-run").startswith("would write")
    assert json.loads(run("import", published_dir, "--out", parent, "--json"))["layers"] == 14
    export = ["export", parent, "--out", out, "--width", "4", "--format", "gptq"]
    assert run(*export, "--dry-run").startswith("would export precision 4")
    report = json.loads(run(*export, "--json", "--text", text_file, "--seq-len", "32", "--limit-windows", "4"))
    assert report["perplexity"] == report["slice_perplexity"]
    assert run(*export, "--overwrite").startswith(f"wrote {out}: precision 4 of {parent} as gptq, 4 bits per weight")
