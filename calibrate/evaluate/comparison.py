"""Which model a parent is compared with, and whether it can be."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from calibrate.data import load_tokenizer
from calibrate.evaluate.options import EvaluateOptions
from calibrate.export import LOG_FILE
from calibrate.model import load_config
from matgptq_vllm.core.errors import InputError

SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
"""What an original and what came from it have in common."""


@dataclass(frozen=True)
class Choice:
    """The original to compare with, or why there is none."""

    directory: Path | None
    note: str | None = None


def choose_original(options: EvaluateOptions, config: PretrainedConfig) -> Choice:
    """The folder in ``--original``, or the one that the calibration log names if it is still there.

    Args:
        config: of the model to measure.

    Raises:
        InputError: the folder given is no model, or no model that this one can have come from.
    """
    left_out = "KL and top-1 agreement are left out"
    if options.no_original:
        return Choice(None)
    if options.original is not None:
        check_original(options.original, options.model, config)
        return Choice(options.original)
    recorded = recorded_original(options.model)
    if recorded is None:
        return Choice(None, f"{left_out}: {LOG_FILE} names no original; pass --original MODEL")
    if not (recorded / "config.json").is_file():
        return Choice(None, f"{left_out}: the original, {recorded}, is not there; pass --original MODEL")
    check_original(recorded, options.model, config)
    return Choice(recorded)


def recorded_original(parent: Path) -> Path | None:
    """The model that ``parent`` was calibrated from, as its log names it."""
    try:
        log: Any = json.loads((parent / LOG_FILE).read_text(encoding="utf-8"))
        return Path(log["options"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shape_difference(original: Path, config: PretrainedConfig) -> str | None:
    """How the model in ``original`` differs from one of configuration ``config``, in words; None if it can be its original."""
    found, wanted = load_config(original).get_text_config(), config.get_text_config()
    for name in SHAPE:
        if getattr(found, name, None) != getattr(wanted, name, None):
            return f"its {name} is {getattr(found, name, None)}, not {getattr(wanted, name, None)}"
    return None


def check_original(original: Path, model: Path, config: PretrainedConfig) -> None:
    """InputError unless ``original`` is a model like ``model``, whose configuration is ``config``, with its tokenizer."""
    differing = shape_difference(original, config)
    if differing is not None:
        raise InputError(
            f"{original} is not the original of {model}: {differing}; give the model that was calibrated, or pass --no-original"
        )
    if load_tokenizer(original).get_vocab() != load_tokenizer(model).get_vocab():
        raise InputError(
            f"the tokenizers of {original} and {model} have different vocabularies, so the same text is not the same "
            "tokens to them; copy the original's tokenizer files into the parent, or pass --no-original"
        )
