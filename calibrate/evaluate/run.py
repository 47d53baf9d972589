"""One evaluation, from options to results."""

from pathlib import Path
from typing import Any

import torch

from calibrate.data import encode_text, leading_windows, load_tokenizer
from calibrate.device import resolve_device
from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.evaluate.report import Result
from calibrate.evaluate.sliced_model import load_profile_model, set_profile
from calibrate.model import find_blocks, load_model
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE
from matgptq_vllm.core.storage import profile_bytes


def run_evaluation(options: EvaluateOptions) -> list[Result]:
    """Perplexity in float32 at the profile asked for, or at every profile of the parent, narrow to wide.

    Raises:
        InputError: no such model, profile or text, or a width of a model that is not a parent.
        FormatError: the parent is damaged.
    """
    if not (options.model / CONFIG_FILE).is_file():
        raise InputError(f"{options.model} has no {CONFIG_FILE}: neither a parent nor a Hugging Face model folder")
    device = resolve_device(options.device)
    if (options.model / MANIFEST_FILE).is_file():
        return _evaluate_parent(options, device)
    if options.precision is not None:
        raise InputError(
            f"{options.model} is not a parent and has no precision {options.precision!r}; "
            "leave --width and --profile out to measure it as it is"
        )
    return [_evaluate_plain(options, device)]


def _evaluate_parent(options: EvaluateOptions, device: torch.device) -> list[Result]:
    reader = ParentReader(options.model)
    profiles = reader.profiles() if options.precision is None else [reader.profile(options.precision)]
    model: Any = load_profile_model(reader, profiles[0])
    model.to(device)
    windows = _windows(options, model.config.get_text_config().vocab_size)
    num_weights = reader.num_weights
    results = []
    for profile in profiles:
        set_profile(model, reader, profile)
        measured = measure_perplexity(model, windows, profile.name)
        results.append(
            Result(
                model=str(options.model),
                precision=profile.name,
                perplexity=measured.perplexity,
                tokens=measured.tokens,
                seq_len=options.seq_len,
                bits_per_weight=profile.average_bits(num_weights),
                weight_bytes=profile_bytes(reader, profile),
            )
        )
    return results


def _evaluate_plain(options: EvaluateOptions, device: torch.device) -> Result:
    model: Any = load_model(options.model)
    stored_dtype = model.dtype
    weights = [linear.weight for block in find_blocks(model) for linear in block.linears.values()]
    weight_bytes = sum(weight.nbytes for weight in weights)
    windows = _windows(options, model.config.get_text_config().vocab_size)
    name = str(stored_dtype).removeprefix("torch.")
    measured = measure_perplexity(model.to(device=device, dtype=torch.float32), windows, name)
    return Result(
        model=str(options.model),
        precision=name,
        perplexity=measured.perplexity,
        tokens=measured.tokens,
        seq_len=options.seq_len,
        bits_per_weight=8.0 * stored_dtype.itemsize,
        weight_bytes=weight_bytes,
    )


def _windows(options: EvaluateOptions, vocab_size: int) -> torch.Tensor:
    """int64 [num_windows, seq_len]."""
    tokens = encode_text(options.text, load_tokenizer(Path(options.model)), vocab_size)
    return leading_windows(tokens, options.seq_len, options.limit_windows, options.text)
