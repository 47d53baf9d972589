"""What a search works on: text in windows, the original's folder, and the digests by which a changed input is noticed."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from calibrate.data import encode_text, load_tokenizer, sample_windows
from calibrate.evaluate.comparison import recorded_original, shape_difference
from calibrate.search.options import SearchOptions
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE

DIGITS = 16
"""Hexadecimal digits of a digest that are kept: enough to notice a change."""


@dataclass(frozen=True)
class SearchText:
    """The text of a search."""

    windows: torch.Tensor
    """int64 [num_samples, seq_len]: searched on."""

    held_out: torch.Tensor | None
    """int64 [num_windows, held_out_seq_len], from the end of the text: not searched on."""


def read_windows(options: SearchOptions, config: PretrainedConfig) -> SearchText:
    """Windows drawn from the text, apart from its held-out end, and windows of that end.

    Raises:
        InputError: the text is too short, or windows are longer than the model's context.
    """
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    longest = max(options.seq_len, options.held_out_seq_len if options.held_out else 0)
    if context is not None and longest > context:
        raise InputError(
            f"windows of {longest} tokens were asked for, but the model's context is {context} tokens; "
            "use at most that for --seq-len and --held-out-seq-len"
        )
    tokens = encode_text(options.text, load_tokenizer(options.model), text_config.vocab_size)
    held_out = round(len(tokens) * options.held_out)
    searched, end = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
    windows = sample_windows(searched, options.num_samples, options.seq_len, options.seed, options.text)
    if not options.held_out:
        return SearchText(windows, None)
    available = len(end) // options.held_out_seq_len
    if not available:
        raise InputError(
            f"the held-out part of {options.text} ({options.held_out:g} of it) has {len(end)} tokens; one window needs "
            f"{options.held_out_seq_len}. Give more text, a smaller --held-out-seq-len, or --held-out 0"
        )
    count = min(available, options.held_out_samples)
    return SearchText(windows, sample_windows(end, count, options.held_out_seq_len, options.seed, options.text))


def find_original(options: SearchOptions, config: PretrainedConfig) -> Path:
    """Folder of the original model: the one given, or the one that the calibration log names.

    Args:
        config: of the parent.

    Raises:
        InputError: there is none, or it is not what the parent was made from.
    """
    original = options.original or recorded_original(options.model)
    if original is None:
        raise InputError(
            f"search compares with the original model, and {options.model} does not say what it was calibrated from; "
            "pass --original MODEL"
        )
    if options.original is None and not (original / CONFIG_FILE).is_file():
        raise InputError(
            f"search compares with the original model, and {original}, from which {options.model} was calibrated, is not "
            "there; pass --original MODEL"
        )
    differing = shape_difference(original, config)
    if differing is not None:
        raise InputError(
            f"{original} is not the original of {options.model}: {differing}; pass the model that was calibrated as --original"
        )
    return original


def fingerprint(
    options: SearchOptions, text: SearchText, original: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """What measurements depend on: a name and a digest or value each, for ``Journal``."""
    return {
        "parent": _digest_files([options.model / MANIFEST_FILE, options.model / CONFIG_FILE]),
        "original model": _digest_files([original / CONFIG_FILE, *sorted(original.glob("*.safetensors"))]),
        "windows of text": hashlib.sha256(text.windows.numpy().tobytes()).hexdigest()[:DIGITS],
        "--text": _digest_files([options.text]),
        "--seed": str(options.seed),
        "--num-samples": str(options.num_samples),
        "--seq-len": str(options.seq_len),
        "--held-out": f"{options.held_out:g}",
        "device": device.type,
        "type": str(dtype).removeprefix("torch."),
    }


def _digest_files(paths: Iterable[Path]) -> str:
    sha256 = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha256.update(chunk)
    return sha256.hexdigest()[:DIGITS]
