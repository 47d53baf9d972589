"""A model of a few thousand weights, a text and a parent of it, for the commands of the pages."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, example_model: Path) -> Path:
    """The example's tokenizer before a Llama of two small blocks with random weights."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(example_model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory, calibration_text: Path) -> Path:
    """The beginning of the example's text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(calibration_text.read_text()[:20000])
    return path


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    out = tmp_path_factory.mktemp("docs") / "parent"
    return run_calibration(CalibrateOptions(model=tiny_model, out=out, method="rtn", group_size=32))
