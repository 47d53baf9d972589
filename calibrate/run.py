"""One calibration, from options to a parent on disk. The only module that owns both the model and the output folder."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from calibrate.clock import PhaseClock
from calibrate.data import encode_text, load_tokenizer, sample_windows
from calibrate.device import resolve_device, resolve_dtype
from calibrate.expert_tokens import TOKENS, TOKENS_WANTED
from calibrate.export import check_target, write_companions
from calibrate.few_tokens import tokens_wanted
from calibrate.fingerprint import fingerprint
from calibrate.journal import Journal
from calibrate.model import Block, find_blocks, load_config, skeleton
from calibrate.options import CalibrateOptions
from calibrate.pipeline import Calibration, RoundedBlock, round_blocks, round_blocks_to_nearest
from calibrate.ranks import Ranks, joined_ranks
from calibrate.rounding import RoundingSettings
from calibrate.weights_source import SafetensorsSource, unquantized
from matgptq_vllm.core.checkpoint_writer import ParentWriter
from matgptq_vllm.core.errors import InputError, UnsupportedError
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.slicing import check_rule

SHARD_BYTES = 1 << 30
"""Of the parent's files. One of every plane is in memory while a parent is written."""


@dataclass(frozen=True)
class Inputs:
    """What a run works on, checked."""

    model: PreTrainedModel
    """Skeleton."""
    blocks: Sequence[Block]
    source: SafetensorsSource
    windows: torch.Tensor | None
    """int64 [num_samples, seq_len]; None where no text is needed."""
    replaces: bool
    """Whether an old parent may be replaced."""


def run_calibration(options: CalibrateOptions) -> Path:
    """Calibrate a model; returns the folder of the parent.

    The folder appears, or is replaced, only when it is whole. A run that ends early leaves a hidden folder beside it that no
    reader takes for a parent; the same call takes it up at the block that it was in.

    Raises:
        InputError: something in ``options`` cannot be used, or an unfinished run had other inputs; nothing was written.
        UnsupportedError: the model has layers that cannot be quantized; nothing was written.
        OSError: the disk is full or the folder cannot be written; an old parent there is untouched.
    """
    with joined_ranks(os.environ, resolve_device(options.device)) as ranks:
        with ranks.together():
            inputs = _inputs(options)
        with ranks.together():
            journal = None
            if ranks.is_first:
                facts = fingerprint(options, inputs.source.files, ranks.device, ranks.size)
                journal = Journal(options.out, facts, options.restart)
        with journal or nullcontext():
            finished = _earlier(journal, ranks)
            try:
                _round_all(options, inputs, ranks, finished, journal)
            except (InputError, UnsupportedError):
                # Another run on the same inputs would end the same way.
                if journal is not None:
                    journal.discard()
                raise
            with ranks.together():
                if journal is not None:
                    _write_parent(options, inputs, journal)
                    journal.discard()
    return options.out


def plan(options: CalibrateOptions) -> str:
    """What ``run_calibration`` would do, after all its checks of the input; nothing is written."""
    resolve_device(options.device)
    inputs = _inputs(options)
    text = "without text"
    if inputs.windows is not None:
        text = f"with {inputs.windows.shape[0]} windows of {inputs.windows.shape[1]} tokens of {options.text}"
    linears = [linear for block in inputs.blocks for linear in block.linears.values()]
    num_weights = sum(linear.weight.numel() for linear in linears)
    return (
        f"would calibrate {len(linears)} linear layers ({num_weights / 1e6:.1f} M weights) of {len(inputs.blocks)} blocks of "
        f"{options.model} by {options.method}, {text}, and write {options.out}"
    )


def parent_spec(options: CalibrateOptions) -> ParentSpec:
    """The spec of the parent that ``options`` ask for."""
    return ParentSpec(slice_rule=options.slice_rule, group_size=options.group_size)


def rounding_settings(options: CalibrateOptions) -> RoundingSettings:
    """How the layers of that parent are rounded."""
    spec = parent_spec(options)
    return RoundingSettings(
        slice_rule=check_rule(spec.slice_rule),
        group_size=spec.group_size,
        scale_dtype=getattr(torch, spec.scale_dtype),
        width_weights=options.widths,
        damp=options.damp,
        asymmetry=options.asymmetry,
        sweeps=options.sweeps,
    )


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


def _inputs(options: CalibrateOptions) -> Inputs:
    replaces = check_target(options.out, options.overwrite)
    config = load_config(options.model)
    model = skeleton(config)
    blocks = find_blocks(model)
    windows = None if options.method == "rtn" else calibration_windows(options, config)
    return Inputs(model, blocks, SafetensorsSource(options.model, model), windows, replaces or options.overwrite)


def _earlier(journal: Journal | None, ranks: Ranks) -> Callable[[int], RoundedBlock | None]:
    """What an earlier run made of a block, in every process; only the first has the journal."""

    def read(index: int) -> RoundedBlock | None:
        with ranks.together():
            block = journal.read(index) if journal is not None else None
        return ranks.from_first((block,))[0]

    return read


def _round_all(
    options: CalibrateOptions,
    inputs: Inputs,
    ranks: Ranks,
    finished: Callable[[int], RoundedBlock | None],
    journal: Journal | None,
) -> None:
    """Round every block, and keep each in the journal as soon as it is rounded."""
    for index, block in enumerate(_rounded(options, inputs, ranks, finished)):
        with ranks.together():
            if journal is not None and journal.read(index) is None:
                journal.write(index, block)


def _rounded(
    options: CalibrateOptions, inputs: Inputs, ranks: Ranks, finished: Callable[[int], RoundedBlock | None]
) -> Iterator[RoundedBlock]:
    settings = rounding_settings(options)
    if inputs.windows is None:
        return round_blocks_to_nearest(inputs.blocks, inputs.source, settings, ranks, finished)
    if len(inputs.windows) < ranks.size:
        raise InputError(
            f"{ranks.size} processes cannot share {len(inputs.windows)} windows; start fewer, or give more --num-samples"
        )
    hidden_size = inputs.model.config.get_text_config().hidden_size
    dtype = resolve_dtype(options.compute_dtype, ranks.device, hidden_size)
    calibration = Calibration(settings, options.streams, dtype, ranks, PhaseClock(ranks.device))
    return round_blocks(inputs.model, inputs.blocks, inputs.source, inputs.windows, calibration, finished)


def _write_parent(options: CalibrateOptions, inputs: Inputs, journal: Journal) -> None:
    """Make the parent out of the blocks in the journal and the other weights of the model."""
    spec = parent_spec(options)
    layers: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    with ParentWriter(options.out, spec, overwrite=inputs.replaces, shard_bytes=SHARD_BYTES) as writer:
        for index in range(len(inputs.blocks)):
            block = journal.read(index)
            assert block is not None
            for layer in block.layers:
                writer.add_layer(layer.name, layer.codes, layer.scales)
                layers[layer.name] = {
                    "shape": list(layer.codes.shape),
                    TOKENS: layer.num_tokens,
                    "errors": {str(width): error for width, error in layer.errors.items()},
                }
                if inputs.windows is not None and layer.name in inputs.blocks[index].experts:
                    layers[layer.name][TOKENS_WANTED] = tokens_wanted(layer.codes.shape[1])
            blocks[block.name] = {"seconds": round(block.seconds, 3), "peak_bytes": block.peak_bytes}
        for name, tensor in unquantized(inputs.model, inputs.source, set(layers)):
            writer.add_tensor(name, tensor)
        log = {"options": _plain(options), "layers": layers, "run": _run_log(blocks)}
        write_companions(options.model, writer.directory, spec, options, log)
        writer.finish()


def _run_log(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The part of the log that differs from run to run."""
    return {
        "seconds": round(sum(block["seconds"] for block in blocks.values()), 3),
        "peak_bytes": max(block["peak_bytes"] for block in blocks.values()),
        "blocks": blocks,
    }


def _plain(options: CalibrateOptions) -> dict[str, Any]:
    """The options that decide the result, as JSON values."""
    values: dict[str, Any] = {}
    for spec in fields(options):
        value = getattr(options, spec.name)
        if spec.name in ("out", "overwrite", "restart", "dry_run"):
            continue
        values[spec.name] = str(value) if isinstance(value, Path) else value
    return values
