"""Whole models with random weights: what is on disk is what a user would serve."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from loadtests.engine.loading import main as load
from loadtests.engine.random_models import main
from loadtests.engine.shapes import SHAPES
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.slicing import dequantize

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each format."""
    folder = tmp_path_factory.mktemp("models")
    for variant in ("ours", "bf16", "w4-marlin"):
        assert main(["--shape", "tiny", "--variant", variant, "--out", str(folder / variant)]) == 0
    return folder


def test_a_parent_is_whole_and_its_weights_keep_the_size_of_activations(written: Path) -> None:
    reader = ParentReader(written / "ours")
    assert reader.layers == TINY.linear_layers()
    name, (_, k) = next(iter(TINY.linear_layers().items()))
    codes, scales = reader.layer(name)
    weights = dequantize(codes, scales, 8, "curved", reader.spec.group_size, torch.float32)
    assert weights.std().item() * k**0.5 == pytest.approx(1.0, rel=0.15)
    assert len(list(reader.unquantized())) == 2 * TINY.layers + 3


def test_a_peer_has_packed_integers_in_the_shape_that_vllm_reads(written: Path) -> None:
    with safe_open(written / "w4-marlin" / "model-00000.safetensors", "pt") as file:
        packed = file.get_tensor("model.layers.0.mlp.down_proj.weight_packed")
        assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (TINY.hidden, TINY.intermediate // 8))
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_scale").shape == (TINY.hidden, TINY.intermediate // 128)
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_shape").tolist() == [TINY.hidden, TINY.intermediate]


def test_a_prompt_has_as_many_tokens_as_words(written: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written / "ours")
    assert tokenizer.encode("w5 w1023 w2", add_special_tokens=False) == [5, 1023, 2]
    assert tokenizer.decode([5, 1023, 2]) == "w5 w1023 w2"


def test_a_folder_that_exists_is_left_alone(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant in ("ours", "bf16"):
        assert main(["--shape", "tiny", "--variant", variant, "--out", str(written / variant)]) == 2
        assert "exists" in capsys.readouterr().err


@pytest.mark.engine
def test_loads_are_timed_one_after_the_other(
    written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert load([f"{written}/ours@4", f"{written}/bf16", "--repeats", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["model", f"{written}/ours@4", f"{written}/bf16"]
    assert all(float(row[2]) > 0 for row in rows[1:])


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load([f"{tmp_path}/none", "--repeats", "1"]) == 1
    assert f"{tmp_path}/none was not loaded" in capsys.readouterr().err
