import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.run import run_evaluation
from calibrate.evaluate.sliced_model import layer_values, load_sliced_model
from calibrate.exchange.import_run import run_import
from calibrate.exchange.options import ImportOptions
from calibrate.inspect import describe_parent
from calibrate.options import InspectOptions
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.folder_swap import partial_directory

from .conftest import WIDTHS, edit_config, published_values, read_weights, write_weights

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def imported(source, out, **options):
    return run_import(ImportOptions(source, out, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quant_dtype": "bfloat16", "shards": 3},
        {"group_size": -1},
        {"group_size": 32, "seed": 5, "shards": 2},
    ],
)
def test_every_width_has_the_weights_of_the_published_formula(make_published, tmp_path, options):
    source = make_published(**options)
    report = imported(source, tmp_path / "parent")
    assert (report.layers, report.group_size) == (14, options.get("group_size", 32))
    reader = ParentReader(tmp_path / "parent")
    assert (reader.spec.slice_rule, reader.spec.scale_dtype) == ("round", options.get("quant_dtype", "float16"))
    weights = read_weights(source)
    assert set(reader.layers) == {name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")}
    for name in reader.layers:
        for width in WIDTHS:
            expected = published_values(weights[f"{name}.qweight"], weights[f"{name}.scales"], width)
            assert torch.equal(layer_values(reader, name, width), expected), (name, width)


def test_the_rest_of_the_folder_comes_along(published_dir, tmp_path):
    out = tmp_path / "parent"
    imported(published_dir, out)
    weights, others = read_weights(published_dir), dict(ParentReader(out).unquantized())
    assert set(others) == {name for name in weights if not name.endswith(("qweight", "scales"))}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in others.items())
    config = json.loads((published_dir / "config.json").read_text())
    new = json.loads((out / "config.json").read_text())
    assert new.pop("quantization_config")["quant_method"] == "matgptq"
    assert new == {key: value for key, value in config.items() if key != "quantization_config"}
    assert (
        AutoTokenizer.from_pretrained(out)("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(published_dir)("a b")["input_ids"]
    )
    card = (out / "README.md").read_text()
    assert "| slice rule | round |" in card
    assert "2602.03537" in card
    assert describe_parent(InspectOptions(out, verify=True))["verified_tensors"] == 14 * 6 + len(others)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_an_imported_parent_is_the_published_model(published_dir, plain_dir, text_file, tmp_path, width):
    imported(published_dir, tmp_path / "parent")
    expected = AutoModelForCausalLM.from_pretrained(plain_dir, dtype=torch.float32)
    weights = read_weights(published_dir)
    for name, tensor in weights.items():
        if name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            values = published_values(tensor, weights[f"{layer}.scales"], width)
            expected.get_submodule(layer).weight.data.copy_(values)
    tokens = torch.tensor([list(text_file.read_bytes()[:50])])
    model = load_sliced_model(tmp_path / "parent", str(width))
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_an_imported_parent_is_evaluated(published_dir, text_file, tmp_path):
    imported(published_dir, tmp_path / "parent")
    options = EvaluateOptions(tmp_path / "parent", text=text_file, seq_len=32, limit_windows=4, width=4)
    assert run_evaluation(options)


def test_tensors_that_the_model_has_no_place_for_are_left_out_and_named(published_dir, tmp_path):
    weights = read_weights(published_dir) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    write_weights(published_dir, weights)
    report = imported(published_dir, tmp_path / "parent")
    assert report.notes == ("left out 1 tensors the model has no place for: model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert "note: left out" in report.as_text("wrote")
    assert "inv_freq" not in str(dict(ParentReader(tmp_path / "parent").unquantized()).keys())


def test_a_width_that_parents_lack_is_noted(published_dir, tmp_path):
    edit_config(published_dir, {"inference_bitwidth": 5})
    assert imported(published_dir, tmp_path / "parent").notes == ("the source runs at 5 bits; a parent serves 2, 3, 4, 6, 8",)


def test_without_a_type_scales_keep_the_one_they_are_stored_in(make_published, tmp_path):
    source = make_published(group_size=-1, quant_dtype="bfloat16")
    edit_config(source, {"quant_dtype": None})
    assert imported(source, tmp_path / "parent").scale_dtype == "bfloat16"


def test_scales_get_the_type_that_the_published_plugin_casts_them_to(published_dir, tmp_path):
    weights = read_weights(published_dir)
    weights[f"{UP}.scales"] = weights[f"{UP}.scales"].float() * 1.0001
    write_weights(published_dir, weights)
    imported(published_dir, tmp_path / "parent")
    expected = published_values(weights[f"{UP}.qweight"], weights[f"{UP}.scales"].half(), 8)
    assert torch.equal(layer_values(ParentReader(tmp_path / "parent"), UP, 8), expected)


def change_tensors(directory, change):
    weights = read_weights(directory)
    change(weights)
    write_weights(directory, weights)


def set_value(name, position, value):
    def change(weights):
        weights[name] = weights[name].clone()
        weights[name][position] = value

    return change


BAD_TENSORS = {
    "no scales": (lambda w: w.pop(f"{UP}.scales"), "up_proj has qweight but no scales"),
    "no layer": (
        lambda w: w.pop(f"{UP}.qweight"),
        "hold neither model.layers.1.mlp.up_proj.weight nor model.layers.1.mlp.up_proj",
    ),
    "no embeddings": (lambda w: w.pop("model.embed_tokens.weight"), "the weights hold no model.embed_tokens.weight"),
    "NaN scale": (set_value(f"{DOWN}.scales", (3, 1), float("nan")), "down_proj.scales: 1 of 192 values are NaN or infinite"),
    "infinite scale": (set_value(f"{DOWN}.scales", (0, 0), float("inf")), "values are NaN or infinite as float16"),
    "NaN elsewhere": (set_value("model.norm.weight", 0, float("nan")), "model.norm.weight: 1 of 64 values"),
    "scale beyond float16": (
        lambda w: w.update({f"{UP}.scales": w[f"{UP}.scales"].float() + 1e6}),
        "192 of 192 values are NaN or infinite as float16",
    ),
    "transposed codes": (
        lambda w: w.update({f"{UP}.qweight": w[f"{UP}.qweight"].t()}),
        "qweight is U8 [64, 96]; the model needs",
    ),
    "packed codes": (lambda w: w.update({f"{UP}.qweight": w[f"{UP}.qweight"].view(torch.int32)}), "qweight is I32 [96, 16]"),
    "other groups": (
        lambda w: w.update({f"{UP}.scales": w[f"{UP}.scales"][:, :1]}),
        "scales has shape [96, 1]; 96 outputs and 64",
    ),
    "integer scales": (lambda w: w.update({f"{UP}.scales": w[f"{UP}.scales"].int()}), "scales is I32; scales are one of F16"),
    "zero points": (lambda w: w.update({f"{UP}.qzeros": w[f"{UP}.qweight"]}), "up_proj has qzeros: zero points or an order"),
    "activation order": (lambda w: w.update({f"{UP}.perm": torch.arange(64)}), "up_proj has perm"),
    "both": (lambda w: w.update({f"{UP}.weight": torch.ones(96, 64)}), "has both qweight and weight"),
    "quantized head": (lambda w: w.update({"lm_head.qweight": w["lm_head.weight"].byte()}), "['lm_head'] are quantized"),
    "plain layer": (
        lambda w: (w.update({f"{DOWN}.weight": torch.ones(64, 96)}), w.pop(f"{DOWN}.qweight"), w.pop(f"{DOWN}.scales")),
        "down_proj is not quantized, but modules_to_not_convert ['lm_head', 'norm'] does not name it",
    ),
    "another model's norm": (lambda w: w.update({"model.norm.weight": torch.ones(63)}), "has shape [63], the model needs [64]"),
}

BAD_CONFIGS = [
    ({"master_bitwidth": 4}, "master_bitwidth is 4; a parent has codes of 8 bits"),
    ({"master_bitwidth": None}, "master_bitwidth is None"),
    ({"inference_bitwidth": 9}, "inference_bitwidth is 9"),
    ({"inference_bitwidth": "4"}, "inference_bitwidth is '4'"),
    ({"sym": False}, "sym is False; the format stores neither zero points"),
    ({"symmetric": False}, "symmetric is False"),
    ({"act_order": True}, "act_order is True"),
    ({"group_size": 48}, "group_size is 48; parents have one of 32, 64, 128, -1"),
    ({"group_size": True}, "group_size is True"),
    ({"group_size": 64}, "scales has shape [64, 2]; 64 outputs and 64 inputs in groups of 64 need [64, 1]"),
    ({"quant_dtype": "float8"}, "quant_dtype is 'float8'"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
    ({"modules_to_not_convert": ["up_proj"]}, "up_proj is quantized, but modules_to_not_convert ['up_proj'] says"),
    ({"quant_method": "gptq"}, "quant_method is 'gptq', import reads 'matgptq_quant'"),
    ({"zero_point": True}, "unknown fields ['zero_point']"),
]


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_weights_that_no_parent_can_have_are_refused_and_nothing_is_left(published_dir, tmp_path, case):
    change, message = BAD_TENSORS[case]
    change_tensors(published_dir, change)
    out = tmp_path / "parent"
    with pytest.raises(InputError, match=re.escape(message)):
        imported(published_dir, out)
    assert not out.exists()
    assert not partial_directory(out).exists()


@pytest.mark.parametrize(("quantization", "message"), BAD_CONFIGS)
def test_configurations_that_no_parent_can_have_are_refused(published_dir, tmp_path, quantization, message):
    edit_config(published_dir, quantization)
    with pytest.raises(InputError, match=re.escape(message)):
        imported(published_dir, tmp_path / "parent", dry_run=True)


def test_without_a_group_size_it_is_the_published_default_and_must_divide_the_inputs(published_dir, tmp_path):
    edit_config(published_dir, {"group_size": None})
    with pytest.raises(InputError, match="64 inputs, not a multiple of group_size 128"):
        imported(published_dir, tmp_path / "parent")


def test_a_layer_fused_with_a_plain_one_is_refused(published_dir, tmp_path):
    def unquantize(weights):
        weights[f"{UP}.weight"] = torch.ones(96, 64)
        del weights[f"{UP}.qweight"], weights[f"{UP}.scales"]

    change_tensors(published_dir, unquantize)
    edit_config(published_dir, {"modules_to_not_convert": ["lm_head", "layers.1.mlp.up_proj"]})
    with pytest.raises(InputError, match=r"gate_proj is quantized but up_proj beside it is not"):
        imported(published_dir, tmp_path / "parent")


def test_a_layer_that_the_source_leaves_plain_stays_plain(published_dir, tmp_path):
    def unquantize(weights):
        weights[f"{DOWN}.weight"] = torch.ones(64, 96)
        del weights[f"{DOWN}.qweight"], weights[f"{DOWN}.scales"]

    change_tensors(published_dir, unquantize)
    edit_config(published_dir, {"modules_to_not_convert": ["lm_head", "norm", "layers.1.mlp.down_proj"]})
    assert imported(published_dir, tmp_path / "parent").layers == 13
    assert torch.equal(dict(ParentReader(tmp_path / "parent").unquantized())[f"{DOWN}.weight"], torch.ones(64, 96))


def test_a_folder_that_is_no_checkpoint_is_refused(plain_dir, published_dir, tmp_path):
    with pytest.raises(InputError, match="quant_method is None"):
        imported(plain_dir, tmp_path / "parent")
    with pytest.raises(InputError, match=r"has no config\.json"):
        imported(tmp_path / "nowhere", tmp_path / "parent")
    (published_dir / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"):
        imported(published_dir, tmp_path / "parent")
    (published_dir / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as a JSON object"):
        imported(published_dir, tmp_path / "parent")


def test_damaged_files_are_refused(make_published, tmp_path):
    source = make_published(shards=2)
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    first, second = sorted(set(document["weight_map"].values()))
    moved = next(name for name, file in document["weight_map"].items() if file == second)
    index.write_text(json.dumps({"weight_map": {**document["weight_map"], moved: first}}))
    with pytest.raises(FormatError, match="has no tensor"):
        imported(source, tmp_path / "parent")
    index.write_text(json.dumps({"weight_map": {**document["weight_map"], moved: "../" + second}}))
    with pytest.raises(FormatError, match="files beside it"):
        imported(source, tmp_path / "parent")
    index.write_text(json.dumps(document))
    (source / second).write_bytes((source / second).read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut off"):
        imported(source, tmp_path / "parent")


def test_a_parent_is_replaced_only_when_asked_and_only_by_a_whole_one(published_dir, tmp_path):
    out = tmp_path / "parent"
    imported(published_dir, out)
    before = (out / "matgptq_manifest.json").read_bytes()
    with pytest.raises(InputError, match="pass --overwrite"):
        imported(published_dir, out)
    good = read_weights(published_dir)
    change_tensors(published_dir, set_value(f"{DOWN}.scales", (0, 0), float("nan")))
    with pytest.raises(InputError, match="NaN"):
        imported(published_dir, out, overwrite=True)
    assert (out / "matgptq_manifest.json").read_bytes() == before
    write_weights(published_dir, good | {f"{DOWN}.qweight": good[f"{DOWN}.qweight"] ^ 1})
    imported(published_dir, out, overwrite=True)
    assert (out / "matgptq_manifest.json").read_bytes() != before
    with pytest.raises(InputError, match="is not a parent, so it is not replaced"):
        imported(published_dir, published_dir, overwrite=True)


def test_dry_run_reports_and_writes_nothing(published_dir, tmp_path):
    report = imported(published_dir, tmp_path / "parent", dry_run=True)
    assert report.as_text("would write").startswith(f"would write {tmp_path / 'parent'}: 14 layers, 0.1 M weights, slice rule")
    assert json.loads(report.as_json())["group_size"] == 32
    assert not (tmp_path / "parent").exists()


def test_a_search_result_becomes_a_profile_with_one_width_per_fused_layer(published_dir, tmp_path):
    layers = [name.removesuffix(".qweight") for name in read_weights(published_dir) if name.endswith(".qweight")]
    widths = {name: 2 if "layers.0" in name else 4 for name in layers} | {"model.layers.0.self_attn.k_proj": 6}
    path = tmp_path / "evo-kl-configuration-3.0.txt"
    path.write_text("\n".join(f"{name}: {width}" for name, width in widths.items()))
    report = imported(published_dir, tmp_path / "parent", profiles=(path,))
    assert report.notes == (
        "evo-kl-configuration-3.0.txt: 2 layers got the wider width of a layer that engines fuse them with",
    )
    profile = ParentReader(tmp_path / "parent").profile("evo-kl-configuration-3.0")
    assert profile.widths == widths | {f"model.layers.0.self_attn.{leaf}_proj": 6 for leaf in "qkv"}
    assert report.profiles == {profile.name: profile.average_bits(ParentReader(tmp_path / "parent").num_weights)}


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("mix.txt", lambda lines: lines[1:], "has no width for 1 layers"),
        ("mix.txt", lambda lines: [*lines, lines[0]], "line 15: 'model.layers.0.mlp.down_proj' is there twice"),
        ("mix.txt", lambda lines: ["lm_head: 4", *lines], "line 1: 'lm_head' is not a quantized layer"),
        (
            "mix.txt",
            lambda lines: [lines[0].replace("4", "5"), *lines[1:]],
            "line 1: '5' is not one of the widths 2, 3, 4, 6, 8",
        ),
        ("mix.txt", lambda lines: ["4", *lines], "line 1: '' is not a quantized layer"),
        ("4.txt", lambda lines: lines, "the name '4' means a uniform width"),
        ("a b.txt", lambda lines: lines, "a b"),
    ],
)
def test_a_search_result_that_is_no_profile_is_refused(published_dir, tmp_path, name, edit, message):
    layers = sorted(key.removesuffix(".qweight") for key in read_weights(published_dir) if key.endswith(".qweight"))
    path = tmp_path / name
    path.write_text("\n".join(edit([f"{layer}: 4" for layer in layers])))
    with pytest.raises(InputError, match=re.escape(message)):
        imported(published_dir, tmp_path / "parent", profiles=(path,))
    assert not (tmp_path / "parent").exists()
