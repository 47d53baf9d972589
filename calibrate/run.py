"""One calibration, from options to a parent on disk. The only module that owns both the model and the output folder."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from calibrate.data import encode_text, load_tokenizer, sample_windows
from calibrate.device import resolve_device
from calibrate.export import check_target, other_weights, write_companions
from calibrate.model import find_blocks, load_config, load_model, skeleton
from calibrate.options import CalibrateOptions
from calibrate.pipeline import RoundedLayer, round_blocks, round_blocks_to_nearest
from matgptq_vllm.core.checkpoint_writer import ParentWriter
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import ParentSpec


def run_calibration(options: CalibrateOptions) -> Path:
    """Calibrate a model; returns the folder of the parent.

    The folder appears, or is replaced, only when it is whole. A run that is killed leaves a hidden folder beside it
    that no reader takes for a parent and that the next run removes.

    Raises:
        InputError: something in ``options`` cannot be used; nothing was written.
        UnsupportedError: the model has layers that cannot be quantized; nothing was written.
        OSError: the disk is full or the folder cannot be written; an old parent there is untouched.
    """
    device = resolve_device(options.device)
    replaces = check_target(options.out, options.overwrite)
    config = load_config(options.model)
    find_blocks(skeleton(config))
    windows = None if options.method == "rtn" else calibration_windows(options, config)
    model = load_model(options.model)
    spec = parent_spec(options)
    with ParentWriter(options.out, spec, overwrite=replaces) as writer:
        layers: dict[str, Any] = {}
        for layer in _rounded(model, windows, options, spec, device):
            writer.add_layer(layer.name, layer.codes, layer.scales)
            layers[layer.name] = {
                "shape": list(layer.codes.shape),
                "errors": {str(width): error for width, error in layer.errors.items()},
            }
        for name, tensor in other_weights(model, set(layers)):
            writer.add_tensor(name, tensor)
        log = {"options": _plain(options), "layers": layers}
        write_companions(options.model, writer.directory, spec, options, log)
        writer.finish()
    return options.out


def plan(options: CalibrateOptions) -> str:
    """What ``run_calibration`` would do, after all its checks of the input; nothing is written."""
    resolve_device(options.device)
    check_target(options.out, options.overwrite)
    config = load_config(options.model)
    blocks = find_blocks(skeleton(config))
    text = "without text"
    if options.method != "rtn":
        windows = calibration_windows(options, config)
        text = f"with {windows.shape[0]} windows of {windows.shape[1]} tokens of {options.text}"
    linears = [linear for block in blocks for linear in block.linears.values()]
    num_weights = sum(linear.weight.numel() for linear in linears)
    return (
        f"would calibrate {len(linears)} linear layers ({num_weights / 1e6:.1f} M weights) of {len(blocks)} blocks of "
        f"{options.model} by {options.method}, {text}, and write {options.out}"
    )


def parent_spec(options: CalibrateOptions) -> ParentSpec:
    """The spec of the parent that ``options`` ask for."""
    return ParentSpec(slice_rule=options.slice_rule, group_size=options.group_size)


def calibration_windows(options: CalibrateOptions, config: PretrainedConfig) -> torch.Tensor:
    """Calibration tokens, int64 [num_samples, seq_len].

    Raises:
        InputError: the text is too short, or windows are longer than the model's context.
    """
    assert options.text is not None  # CalibrateOptions requires it of every method but rtn
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and options.seq_len > context:
        raise InputError(f"seq_len is {options.seq_len}, but the model's context is {context} tokens; use at most that")
    tokens = encode_text(options.text, load_tokenizer(options.model), text_config.vocab_size)
    return sample_windows(tokens, options.num_samples, options.seq_len, options.seed, options.text)


def _rounded(
    model: Any, windows: torch.Tensor | None, options: CalibrateOptions, spec: ParentSpec, device: torch.device
) -> Iterator[RoundedLayer]:
    if windows is None:
        return round_blocks_to_nearest(model, spec)
    return round_blocks(model, windows, options, spec, device)


def _plain(options: CalibrateOptions) -> dict[str, Any]:
    """The options that decide the result, as JSON values."""
    values: dict[str, Any] = {}
    for spec in fields(options):
        value = getattr(options, spec.name)
        if spec.name in ("out", "overwrite", "dry_run"):
            continue
        values[spec.name] = str(value) if isinstance(value, Path) else value
    return values
