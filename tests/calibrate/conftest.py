"""Tiny models of every supported family, with a tokenizer of single bytes, and a text to calibrate them on."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from calibrate.options import CalibrateOptions

# Inputs of 40 and 72 leave ragged last groups of 32 and 64.
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(
        **{key: value for key, value in SIZES.items() if key != "head_dim"},
        tie_word_embeddings=False,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, tie_word_embeddings=False, sliding_window=8),
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function from a configuration to the folder of a random model of it, tokenizer included."""

    def make(config: PretrainedConfig) -> Path:
        directory = tmp_path_factory.mktemp(config.model_type)
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
            elif parameter.ndim == 2:
                parameter.data.mul_(6)  # of the default 0.02, too small for attention and MLP to matter
        model.save_pretrained(directory)
        _byte_tokenizer().save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def family_config(request: pytest.FixtureRequest) -> PretrainedConfig:
    """Configuration of a tiny model, of every family in turn."""
    return FAMILIES[request.param]()


@pytest.fixture(scope="session")
def family_dir(family_config: PretrainedConfig, make_model: Callable[..., Path]) -> Path:
    """Folder of a tiny model, of every family in turn."""
    return make_model(family_config)


@pytest.fixture(scope="session")
def llama_dir(make_model: Callable[..., Path]) -> Path:
    """Folder of a tiny Llama model."""
    return make_model(FAMILIES["llama"]())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 bytes, so 4,000 tokens of the tiny models."""
    letters = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(map(chr, letters)))
    return path


@pytest.fixture
def tiny_options(llama_dir: Path, text_file: Path, tmp_path: Path) -> Callable[..., CalibrateOptions]:
    """Function from changes to the options of a calibration that takes well under a second."""

    def make(**changes: object) -> CalibrateOptions:
        values = {
            "model": llama_dir,
            "text": text_file,
            "out": tmp_path / "parent",
            "num_samples": 12,
            "seq_len": 32,
            "group_size": 32,
            "streams": (3,),
            "sweeps": 0,
        }
        return CalibrateOptions(**values | changes)

    return make


@pytest.fixture(scope="session")
def start_apart() -> Callable[..., BaseProcess]:
    """Function that starts Python statements, which see the variables given, in a process of their own.

    Processes come from a server that has imported calibration once: that takes longer than a tiny calibration.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["calibrate.run"])

    def start(statements: str, **variables: object) -> BaseProcess:
        process = context.Process(target=exec, args=(statements, variables))
        process.start()
        return process

    return start


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
