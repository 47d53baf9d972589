"""Mixture-of-experts models from calibration to evaluation, an expert without a token among them."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from calibrate.evaluate.sliced_model import load_profile_model, load_sliced_model, set_profile
from calibrate.journal import Journal
from calibrate.options import CalibrateOptions
from calibrate.run import plan, run_calibration
from matgptq_vllm.cli import main
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.profile import Profile

from .conftest import _byte_tokenizer

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=32, head_dim=16),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=32),
}
QUICK = {"num_samples": 64, "seq_len": 32, "group_size": 32, "streams": (3,), "sweeps": 0}
STARVED = "model.layers.0.mlp.experts.4"


def make_model(config: PretrainedConfig, directory: Path) -> Path:
    """A random model whose hidden states lie near few directions, as those of real models do."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.data.copy_(torch.randn(256, 6) @ torch.randn(6, 64))
        elif parameter.ndim >= 2:
            parameter.data.mul_(6)
    if config.model_type == "qwen3_moe":
        # One of a row and its negative is above 0 for every token, so the two chosen experts are never the last.
        router = model.model.layers[0].mlp.gate.weight.data
        router[1], router[3], router[4] = -router[0], -router[2], 0
    model.save_pretrained(directory)
    _byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """Text in which every token is as likely as the other letters."""
    path = tmp_path_factory.mktemp("letters") / "text.txt"
    path.write_text("".join(map(chr, torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(3)).tolist())))
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """Folder of a tiny model of every family in turn."""
    return make_model(FAMILIES[request.param](), tmp_path_factory.mktemp(request.param) / request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """Folder of a tiny Qwen3-MoE model."""
    return make_model(FAMILIES["qwen3_moe"](), tmp_path_factory.mktemp("qwen") / "qwen")


@pytest.fixture(scope="module")
def qwen_parent(qwen, letters) -> Path:
    """Its parent. Read only."""
    with pytest.warns(UserWarning, match="1 saw none"):
        return run_calibration(CalibrateOptions(qwen, qwen.parent / "parent", letters, **QUICK))


def command(verb: str, *arguments: object, **options: object) -> int:
    """Exit status of a verb."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return main([verb, *map(str, arguments), *given])


def evaluate(parent: Path, text: Path, capsys) -> dict[str, dict]:
    """Results by precision, through the command."""
    assert command("evaluate", parent, "--json", text=text, seq_len=32, limit_windows=24, device="cpu") == 0
    report = json.loads(capsys.readouterr().out)
    return {result["precision"]: result for result in (*report["results"], {**report["original"], "precision": "original"})}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a parent; of the log, what does not differ from run to run."""
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    log = json.loads(files["calibration_log.json"])
    del log["run"]
    return files | {"calibration_log.json": json.dumps(log).encode()}


def test_a_mixture_is_calibrated_close_at_8_bits_and_better_than_rounding_at_3(family, letters, tmp_path, capsys):
    parent, nearest = tmp_path / "parent", tmp_path / "nearest"
    quick = {**QUICK, "streams": "3"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert command("calibrate", family, text=letters, out=parent, device="cpu", **quick) == 0
    assert command("calibrate", family, out=nearest, method="rtn", group_size=32, device="cpu") == 0
    capsys.readouterr()
    ours, baseline = evaluate(parent, letters, capsys), evaluate(nearest, letters, capsys)
    assert ours["8"]["perplexity"] == pytest.approx(ours["original"]["perplexity"], rel=2e-3)
    assert ours["8"]["kl"] < 3e-4
    assert ours["3"]["kl"] < 0.75 * baseline["3"]["kl"]

    reader = ParentReader(parent)
    stored = load_file(family / "model.safetensors")
    unquantized = dict(reader.unquantized())
    quantized = {f"{name}.weight" for name in reader.layers}
    assert quantized | unquantized.keys() == stored.keys()
    assert all(tuple(stored[f"{name}.weight"].shape) == shape for name, shape in reader.layers.items())
    assert {name for name in stored if ".experts." in name} < quantized
    assert sum(name.endswith(".gate.weight") for name in unquantized) == 2
    assert all(torch.equal(tensor, stored[name]) for name, tensor in unquantized.items())


def test_the_plan_counts_every_experts_layers(qwen, letters, tmp_path):
    assert "38 linear layers" in plan(CalibrateOptions(qwen, tmp_path / "parent", letters, **QUICK))


def test_an_expert_without_tokens_is_rounded_all_the_same_and_reported(qwen, qwen_parent, capsys):
    log = json.loads((qwen_parent / "calibration_log.json").read_text())["layers"]
    of_expert = {name: layer for name, layer in log.items() if name.startswith(STARVED)}
    assert [(layer["tokens"], layer["tokens_wanted"]) for layer in of_expert.values()] == [(0, 128), (0, 128), (0, 64)]
    assert log["model.layers.0.self_attn.q_proj"]["tokens"] == 64 * 32
    assert "tokens_wanted" not in log["model.layers.0.self_attn.q_proj"]
    # Each token goes to two experts.
    of_gates = [layer["tokens"] for name, layer in log.items() if "layers.0" in name and name.endswith("gate_proj")]
    assert sum(of_gates) == 2 * 64 * 32

    assert command("inspect", qwen_parent) == 0
    assert f"  {STARVED}  0 of 128 tokens" in capsys.readouterr().out.splitlines()

    original = load_file(qwen / "model.safetensors")
    sliced = load_sliced_model(qwen_parent, "8").state_dict()
    for name in of_expert:
        weight = original[f"{name}.weight"].float()
        assert (sliced[f"{name}.weight"] - weight).norm() < 0.05 * weight.norm()


def test_without_streams_an_expert_without_tokens_is_rounded_by_the_average_too(qwen, letters, tmp_path):
    options = CalibrateOptions(qwen, tmp_path / "parent", letters, **{**QUICK, "streams": ()})
    with pytest.warns(UserWarning, match=r"model\.layers\.0: \d of 5 experts saw fewer than 2 calibration tokens per input"):
        run_calibration(options)
    log = json.loads((options.out / "calibration_log.json").read_text())["layers"]
    # Measured on the average token: more than nothing, and little at 8 bits.
    assert 0 < log[f"{STARVED}.down_proj"]["errors"]["8"] < 1e-3 < log[f"{STARVED}.down_proj"]["errors"]["2"] < 0.5


def test_the_model_of_a_profile_is_the_model_set_to_it(qwen_parent, tmp_path):
    reader = ParentReader(qwen_parent)
    tokens = torch.randint(97, 123, (2, 32), generator=torch.Generator().manual_seed(0))
    mixed = Profile("mix", {name: 2 if ".3." in name else 6 for name in reader.layers})
    model = load_profile_model(reader, reader.profile("8"))
    before = model(tokens).logits
    set_profile(model, reader, mixed)
    after = model(tokens).logits
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, load_profile_model(reader, mixed)(tokens).logits)


@pytest.mark.parametrize("leaves", [("gate_proj", "up_proj"), ("w1", "w3")])
def test_the_gate_of_an_expert_has_the_width_of_its_up_projection(leaves):
    widths = {f"model.layers.0.mlp.experts.{expert}.{leaf}": 2 + expert for expert in (0, 1) for leaf in leaves}
    assert Profile("mix", widths).width_of([name for name in widths if ".1." in name]) == 3
    for name in widths:
        with pytest.raises(InputError, match="no common width for the fused layers"):
            Profile("mix", widths | {name: 8})


def test_a_run_that_ended_between_blocks_is_taken_up_with_the_same_bytes(qwen, qwen_parent, letters, tmp_path, monkeypatch):
    write = Journal.write

    def interrupted(self: Journal, index: int, block: object) -> None:
        write(self, index, block)
        if index == 0:
            raise KeyboardInterrupt

    options = CalibrateOptions(qwen, tmp_path / "parent", letters, **QUICK)
    monkeypatch.setattr(Journal, "write", interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            run_calibration(options)
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(Journal, "write", lambda self, index, block: (written.append(index), write(self, index, block)))
    run_calibration(options)
    assert written == [1]
    expected = contents(qwen_parent)
    found = contents(options.out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
