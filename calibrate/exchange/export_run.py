"""One export, from options to a checkpoint that stock vLLM loads."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from transformers import PreTrainedModel

from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.evaluate.sliced_model import layer_values, load_profile_model
from calibrate.exchange import formats
from calibrate.exchange.cards import export_card
from calibrate.exchange.export_plan import Plan, make_plan
from calibrate.exchange.export_report import EXPORT_FILE, ExportReport
from calibrate.exchange.integer_grid import GridFit, fit_exactly, fit_nearest
from calibrate.exchange.model_folder import ModelFolderWriter
from calibrate.exchange.options import STORED_BITS, ExportOptions
from calibrate.exchange.stored_tensors import StoredTensors
from calibrate.export import write_config
from calibrate.model_card import CARD_FILE
from matgptq_vllm.core.precision import PARENT_WIDTH

SHARD_BYTES = 4 << 30
"""Bytes per shard of the checkpoint; one shard is in memory at a time."""


@dataclass(frozen=True)
class LayerErrors:
    """Relative squared errors of one layer, each over the sum of squares of what it is measured from."""

    to_slice: float
    to_parent: float
    slice_to_parent: float


def run_export(options: ExportOptions) -> ExportReport:
    """Export a slice; the folder appears, or is replaced, only when it is whole.

    Layers are read, fitted and written one at a time.

    Raises:
        InputError, FormatError: as ``make_plan``; nothing was written.
        OSError: the disk is full or the folder cannot be written; an old export there is untouched.
    """
    plan = make_plan(options)
    reader = plan.reader
    zero_points = formats.has_zero_points(options.format, plan.bits)
    zeros: dict[str, torch.Tensor] = {}
    errors: dict[str, LayerErrors] = {}
    inexact = []
    others_exact = {bits: True for bits in STORED_BITS if bits > plan.bits}
    with ModelFolderWriter(options.out, SHARD_BYTES) as writer:
        for name in reader.layers:
            wanted = layer_values(reader, name, plan.profile.widths[name]).to(plan.device)
            parent = layer_values(reader, name, PARENT_WIDTH).to(plan.device)
            fit = _fit(plan, name, wanted, parent if options.fit == "parent" else wanted, zero_points)
            if not torch.equal(fit.values(), wanted):
                inexact.append(name)
                for bits in others_exact:
                    others_exact[bits] &= fit_exactly(wanted, plan.inputs_per_scale(name), bits, plan.scale_dtype) is not None
            errors[name] = LayerErrors(
                _relative_error(fit.values(), wanted), _relative_error(fit.values(), parent), _relative_error(wanted, parent)
            )
            fit = GridFit(fit.codes.cpu(), fit.scales.cpu(), fit.zeros.cpu())
            zeros[name] = fit.zeros
            _add(writer, name, formats.layer_tensors(options.format, fit, plan.bits))
        # Whether zero points vary is one field for all layers, so only now is it known whether they must be stored.
        zero_points &= any((held != 1 << (plan.bits - 1)).any() for held in zeros.values())
        if zero_points:
            for name, held in zeros.items():
                _add(writer, name, formats.zero_point_tensors(held, plan.bits))
        weight_bytes = writer.total_bytes
        for name, tensor in reader.unquantized():
            writer.add(name, tensor)
        report = ExportReport(
            parent=str(options.model),
            checkpoint=str(options.out),
            precision=plan.profile.name,
            format=options.format,
            bits=plan.bits,
            group_size=plan.group_size,
            zero_points=zero_points,
            scale_dtype=reader.spec.scale_dtype,
            layers=len(reader.layers),
            inexact_layers=len(inexact),
            exact_bits=next((bits for bits, exact in others_exact.items() if inexact and exact), None),
            fit=options.fit,
            weight_bytes=weight_bytes,
            slice_error=fmean(error.to_slice for error in errors.values()),
            parent_error=fmean(error.to_parent for error in errors.values()),
            slice_parent_error=fmean(error.slice_to_parent for error in errors.values()),
            errors={name: error.to_slice for name, error in errors.items()},
        )
        write_config(
            options.model,
            writer.directory,
            formats.quantization_config(options.format, plan.bits, plan.group_size, zero_points, plan.unquantized),
        )
        writer.finish_weights()
        if plan.windows is not None:
            report = _with_perplexities(report, plan, writer.directory)
        (writer.directory / CARD_FILE).write_text(
            export_card(options.model.absolute().name, report.as_dict()), encoding="utf-8"
        )
        (writer.directory / EXPORT_FILE).write_text(report.as_json(), encoding="utf-8")
        writer.finish()
    return report


@torch.no_grad()
def set_exported(model: PreTrainedModel, directory: Path, layers: Iterable[str], format: str, bits: int) -> None:
    """Give ``model`` the weights of an exported checkpoint, as its files hold them, in place.

    Args:
        directory: the checkpoint.
        layers: names of its quantized layers.
    """
    stored = StoredTensors(directory)
    for name in layers:
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): stored.get(key) for key in stored.shapes if key.startswith(prefix)}
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(formats.layer_values(format, parts, bits))


def _fit(plan: Plan, name: str, wanted: torch.Tensor, target: torch.Tensor, zero_points: bool) -> GridFit:
    """The slice ``wanted`` itself where the grid holds it, else the nearest fit to ``target``; float32 [N, K] both."""
    size = plan.inputs_per_scale(name)
    exact = fit_exactly(wanted, size, plan.bits, plan.scale_dtype)
    return exact or fit_nearest(target, size, plan.bits, plan.scale_dtype, zero_points)


def _add(writer: ModelFolderWriter, layer: str, tensors: dict[str, torch.Tensor]) -> None:
    for part, tensor in tensors.items():
        writer.add(f"{layer}.{part}", tensor)


def _relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    squares = reference.double().square().sum().item()
    return (values - reference).double().square().sum().item() / squares if squares else 0.0


def _with_perplexities(report: ExportReport, plan: Plan, directory: Path) -> ExportReport:
    """The report with the perplexities of the slice and of the checkpoint in ``directory``, both in float32."""
    assert plan.windows is not None
    model = load_profile_model(plan.reader, plan.profile)
    model.to(plan.device)  # type: ignore[arg-type]
    of_slice = measure_perplexity(model, plan.windows, f"precision {report.precision}")
    set_exported(model, directory, plan.reader.layers, report.format, report.bits)
    of_export = measure_perplexity(model, plan.windows, report.format)
    return replace(report, slice_perplexity=of_slice.perplexity, perplexity=of_export.perplexity)
