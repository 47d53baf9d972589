import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calibrate.evaluate.sliced_model import load_sliced_model
from calibrate.model import find_blocks, load_model
from calibrate.run import plan, run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError

FOLDER = {
    "README.md",
    "calibration_log.json",
    "config.json",
    "generation_config.json",
    "matgptq_manifest.json",
    "matgptq_profiles.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *(f"planes/plane{plane}-00001-of-00001.safetensors" for plane in range(5)),
}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a folder; of the log what does not differ from run to run."""
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    log = json.loads(files["calibration_log.json"])
    del log["run"]
    return files | {"calibration_log.json": json.dumps(log).encode()}


def relative_error(directory, model_dir, width: str) -> float:
    """Mean relative error of the linear weights at a width."""
    original, sliced = load_model(model_dir, torch.float32), load_sliced_model(directory, width)
    names = [name for block in find_blocks(original) for name in block.linears]
    errors = [
        (original.get_submodule(name).weight - sliced.get_submodule(name).weight).norm()
        / original.get_submodule(name).weight.norm()
        for name in names
    ]
    return float(torch.stack(errors).mean())


def test_every_family_becomes_a_whole_parent_that_reloads_at_every_width(family_dir, tiny_options):
    options = tiny_options(model=family_dir)
    directory = run_calibration(options)
    assert directory == options.out
    assert contents(directory).keys() == FOLDER
    assert list(directory.parent.iterdir()) == [directory]
    reader = ParentReader(directory)
    original = load_model(family_dir)
    assert list(reader.layers) == [name for block in find_blocks(original) for name in block.linears]
    stored = load_file(family_dir / "model.safetensors")
    others = dict(reader.unquantized())
    assert others.keys() == {
        name for name in stored if name.removesuffix(".weight") not in reader.layers or name.endswith("bias")
    }
    for name, tensor in others.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored[name])
    errors = [relative_error(directory, family_dir, width) for width in ("8", "6", "4", "3", "2")]
    assert errors == sorted(errors)
    assert errors[0] < 0.2
    assert errors[0] < errors[4] / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 64},
        {"group_size": 128},
        {"group_size": -1},
        {"slice_rule": "round"},
        {"streams": ()},
        {"asymmetry": 0.0, "sweeps": 1},
        {"compute_dtype": "bfloat16"},
    ],
)
def test_every_option_of_rounding_gives_a_parent_with_that_spec(changes, tiny_options, llama_dir):
    options = tiny_options(**changes)
    directory = run_calibration(options)
    reader = ParentReader(directory)
    assert (reader.spec.group_size, reader.spec.slice_rule) == (options.group_size, options.slice_rule)
    assert relative_error(directory, llama_dir, "8") < 0.3


def test_the_same_options_give_the_same_bytes_and_another_seed_other_codes(tiny_options, tmp_path):
    first = run_calibration(tiny_options())
    second = run_calibration(tiny_options(out=tmp_path / "again"))
    assert contents(first) == contents(second)
    other = run_calibration(tiny_options(out=tmp_path / "other", seed=1))
    plane = "planes/plane4-00001-of-00001.safetensors"
    assert (first / plane).read_bytes() != (other / plane).read_bytes()


def test_the_log_has_the_error_of_every_layer_and_width(tiny_options):
    options = tiny_options()
    log = json.loads((run_calibration(options) / "calibration_log.json").read_text())
    assert log["options"]["seed"] == 0
    assert log["layers"].keys() == ParentReader(options.out).layers.keys()
    for layer in log["layers"].values():
        errors = [layer["errors"][str(width)] for width in (8, 4, 3, 2)]
        assert errors == sorted(errors)
        assert 0 < errors[0] < 0.05
        assert layer["tokens"] == 12 * 32
    run = log["run"]
    assert run["blocks"].keys() == {"model.layers.0", "model.layers.1"}
    for block in run["blocks"].values():
        assert 0 < block["seconds"] <= run["seconds"]
        assert 0 < block["peak_bytes"] <= run["peak_bytes"]


def test_rounding_to_nearest_needs_no_text_and_is_the_nearest(tiny_options, llama_dir):
    directory = run_calibration(tiny_options(method="rtn", text=None))
    original, sliced = load_model(llama_dir, torch.float32), load_sliced_model(directory, "8")
    reader = ParentReader(directory)
    for name in reader.layers:
        _, scales = reader.layer(name)
        error = (original.get_submodule(name).weight - sliced.get_submodule(name).weight).abs()
        # Half a step, which is 2 wide at the end of the range, and what rounding the scale to bfloat16 may clip there.
        assert (error <= scales.float().max() * (1 + 192 * 2**-8)).all()
    assert relative_error(directory, llama_dir, "8") < 0.01


def test_the_plan_checks_everything_and_writes_nothing(tiny_options, tmp_path):
    options = tiny_options()
    assert "14 linear layers" in plan(options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="windows of 32 need"):
        plan(replace(options, num_samples=1000))


def test_an_existing_parent_is_replaced_only_when_asked(tiny_options):
    directory = run_calibration(tiny_options(seed=1))
    before = (directory / "calibration_log.json").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        run_calibration(tiny_options())
    assert (directory / "calibration_log.json").read_bytes() == before
    run_calibration(tiny_options(overwrite=True))
    assert (directory / "calibration_log.json").read_bytes() != before
    assert list(directory.parent.iterdir()) == [directory]


def test_a_folder_that_is_no_parent_is_never_replaced(tiny_options, llama_dir, tmp_path):
    model = shutil.copytree(llama_dir, tmp_path / "parent")
    with pytest.raises(InputError, match="is not a parent, so it is not replaced"):
        run_calibration(tiny_options(model=model, overwrite=True))
    assert (model / "model.safetensors").exists()


def test_an_empty_folder_is_used(tiny_options, tmp_path):
    (tmp_path / "parent").mkdir()
    assert ParentReader(run_calibration(tiny_options())).spec.group_size == 32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_left(value, tiny_options, llama_dir, tmp_path):
    model = load_model(llama_dir)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    directory = shutil.copytree(llama_dir, tmp_path / "broken")
    model.save_pretrained(directory)
    for method in ("gptq", "rtn"):
        with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: its weights hold NaN or infinite"):
            run_calibration(tiny_options(model=directory, method=method))
    assert list(tmp_path.iterdir()) == [directory]


def test_inputs_that_are_not_finite_are_refused_by_layer_and_nothing_is_left(tiny_options, llama_dir, tmp_path):
    model = load_model(llama_dir)
    model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    directory = shutil.copytree(llama_dir, tmp_path / "broken")
    model.save_pretrained(directory)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj: its inputs hold NaN or infinite"):
        run_calibration(tiny_options(model=directory))
    assert list(tmp_path.iterdir()) == [directory]


def test_a_sharded_model_gives_the_same_parent(tiny_options, llama_dir, tmp_path):
    sharded = shutil.copytree(llama_dir, tmp_path / llama_dir.name)
    (sharded / "model.safetensors").unlink()
    load_model(llama_dir).save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    expected = contents(run_calibration(tiny_options()))
    found = contents(run_calibration(tiny_options(model=sharded, out=tmp_path / "sharded")))
    for files in (expected, found):
        del files["calibration_log.json"]  # it has the model's path
    assert found == expected


def test_bad_text_is_refused_before_anything_is_written(tiny_options, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(InputError, match=r"empty\.txt has 0 tokens; 12 windows of 32 need 384"):
        run_calibration(tiny_options(text=empty))
    with pytest.raises(InputError, match="context is 64 tokens"):
        run_calibration(tiny_options(seq_len=65))
    assert list(tmp_path.iterdir()) == [empty]
