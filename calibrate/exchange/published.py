"""A checkpoint in the format of the published MatGPTQ plugin, checked against its own configuration and model.

Facts of the format, from the authors' packing script and plugin (IST-DASLab/MatGPTQ, pack_quantized_model.py,
inference_lib/vllm_matgptq.py, src/quant_utils_matgpqt.py):

    config.json  quantization_config = {quant_method: matgptq_quant, master_bitwidth, inference_bitwidth, group_size,
                 quant_dtype: float16 or bfloat16, modules_to_not_convert: suffixes of module names}
    weights      ``{layer}.qweight`` uint8 [N, K] of whole 8-bit codes and ``{layer}.scales`` [N, K / group_size] in place
                 of ``{layer}.weight``; names are those of the Hugging Face model, q/k/v and gate/up apart
    width r      scale * 2^(8-r) * (min(floor(code / 2^(8-r) + 1/2), 2^r - 1) - 2^(r-1)), which is the rule ``round``;
                 the plugin casts scales to quant_dtype when it loads them
    search       evo-*-configuration-*.txt, a line ``layer: width`` per layer; the plugin itself knows one width only
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from calibrate.exchange.published_config import QUANT_DTYPES, check_quantization, read_published_config
from calibrate.exchange.stored_tensors import StoredTensors
from calibrate.model import find_blocks, skeleton
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import CONFIG_FILE
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.profile import FUSED_LAYERS
from matgptq_vllm.core.slicing import num_groups

QWEIGHT, SCALES = "qweight", "scales"

SCALE_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""safetensors' name of a type of scales -> ours."""

FOREIGN_PARTS = ("qzeros", "zeros", "zero", "perm", "g_idx")
"""Tensors beside a qweight that would change its meaning: zero points, and an order of the inputs."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint whose names, types and shapes fit together. Values are checked when they are read."""

    config: Mapping[str, Any]
    """config.json."""

    spec: ParentSpec
    """Constants of the parent that it becomes."""

    layers: Mapping[str, tuple[int, int]]
    """Quantized layers in the model's order: name -> (N, K)."""

    others: tuple[str, ...]
    """Names of the weights that are not quantized."""

    dropped: tuple[str, ...]
    """Names of stored tensors that the model has no place for."""

    inference_width: int
    """The one width that the checkpoint asks the published plugin for."""

    tensors: StoredTensors

    def read_layers(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, codes uint8 [N, K] and scales [N, groups] in the spec's type, layer by layer.

        Raises:
            InputError: a scale is not a finite number.
        """
        for name in self.layers:
            scales = self.tensors.get(f"{name}.{SCALES}").to(getattr(torch, self.spec.scale_dtype))
            check_finite(f"{name}.{SCALES}", scales)
            yield name, self.tensors.get(f"{name}.{QWEIGHT}"), scales

    def read_others(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of every weight that is not quantized; InputError if one has a value that is not finite."""
        for name in self.others:
            tensor = self.tensors.get(name)
            check_finite(name, tensor)
            yield name, tensor


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """InputError unless every value of ``tensor`` (any shape) is a finite number."""
    count = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
    if count:
        raise InputError(
            f"{name}: {count} of {tensor.numel()} values are NaN or infinite as {str(tensor.dtype).removeprefix('torch.')}; "
            "quantize the model again"
        )


def open_published(directory: Path) -> PublishedCheckpoint:
    """The checkpoint in ``directory``; reads configuration and headers, no values.

    Raises:
        InputError: not a checkpoint in the published format, or one that means something no parent can.
        FormatError: a weight file is damaged.
        UnsupportedError: the model has layers that cannot be quantized.
    """
    config, quantization = read_published_config(directory)
    group_size, not_converted = check_quantization(quantization)
    tensors = StoredTensors(directory)
    layers, others = _match_model(directory, tensors, not_converted)
    for name, shape in layers.items():
        _check_scales(name, shape, tensors, group_size)
    spec = ParentSpec(slice_rule="round", group_size=group_size, scale_dtype=_scale_dtype(quantization, layers, tensors))
    used = {*others, *(f"{name}.{part}" for name in layers for part in (QWEIGHT, SCALES))}
    return PublishedCheckpoint(
        config=config,
        spec=spec,
        layers=layers,
        others=tuple(others),
        dropped=tuple(sorted(tensors.shapes.keys() - used)),
        inference_width=quantization["inference_bitwidth"],
        tensors=tensors,
    )


def _match_model(
    directory: Path, tensors: StoredTensors, not_converted: tuple[str, ...]
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Quantized layers (name -> (N, K)) and names of the other weights, all of the shapes that the model has."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise InputError(f"{directory / CONFIG_FILE}: {type(error).__name__}: {error}") from error
    del config.quantization_config
    model = skeleton(config)
    linears = {name for block in find_blocks(model) for name in block.linears}
    persistent = model.state_dict().keys()
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected |= {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in persistent}
    outside = {name.removesuffix(f".{QWEIGHT}") for name in tensors.shapes if name.endswith(f".{QWEIGHT}")} - linears
    if outside:
        raise InputError(f"{sorted(outside)[:4]} are quantized; a parent quantizes linear layers of the model's blocks only")

    layers: dict[str, tuple[int, int]] = {}
    others: list[str] = []
    for name, shape in expected.items():
        layer = name.removesuffix(".weight")
        if layer in linears and name.endswith(".weight") and f"{layer}.{QWEIGHT}" in tensors.shapes:
            _check_qweight(layer, shape, tensors, not_converted)
            layers[layer] = (shape[0], shape[1])
            continue
        if tensors.shapes.get(name) != shape:
            raise InputError(_misfit(name, layer in linears, tensors.shapes.get(name), shape))
        if layer in linears and name.endswith(".weight") and not layer.endswith(not_converted):
            raise InputError(
                f"{layer} is not quantized, but modules_to_not_convert {list(not_converted)} does not name it; "
                "quantize it, or name it there"
            )
        others.append(name)
    if not layers:
        raise InputError(f"{directory} has no quantized layer; give a checkpoint that the published packing script wrote")
    _check_fused(layers, linears)
    return layers, others


def _misfit(name: str, is_linear: bool, found: tuple[int, ...] | None, shape: tuple[int, ...]) -> str:
    if found is not None:
        return f"{name} has shape {list(found)}, the model needs {list(shape)}; config.json belongs to another model"
    wanted = f"neither {name} nor {name.removesuffix('.weight')}.{QWEIGHT}" if is_linear else f"no {name}"
    return f"the weights hold {wanted}; copy the checkpoint again"


def _check_qweight(layer: str, shape: tuple[int, ...], tensors: StoredTensors, not_converted: tuple[str, ...]) -> None:
    name = f"{layer}.{QWEIGHT}"
    if tensors.dtypes[name] != "U8" or tensors.shapes[name] != shape:
        raise InputError(
            f"{name} is {tensors.dtypes[name]} {list(tensors.shapes[name])}; the model needs codes U8 {list(shape)}, "
            "one byte per weight"
        )
    foreign = [part for part in FOREIGN_PARTS if f"{layer}.{part}" in tensors.shapes]
    if foreign:
        raise InputError(
            f"{layer} has {', '.join(foreign)}: zero points or an order of the inputs, which no parent has; "
            "quantize with --sym and without --act_order"
        )
    if f"{layer}.weight" in tensors.shapes:
        raise InputError(f"{layer} has both {QWEIGHT} and weight; remove the one that is not meant")
    if layer.endswith(not_converted):
        raise InputError(f"{layer} is quantized, but modules_to_not_convert {list(not_converted)} says that it is not")


def _check_scales(layer: str, shape: tuple[int, int], tensors: StoredTensors, group_size: int) -> None:
    name = f"{layer}.{SCALES}"
    if name not in tensors.shapes:
        raise InputError(f"{layer} has {QWEIGHT} but no {SCALES}; copy the checkpoint again")
    if tensors.dtypes[name] not in SCALE_TYPES:
        raise InputError(f"{name} is {tensors.dtypes[name]}; scales are one of {', '.join(SCALE_TYPES)}")
    n, k = shape
    if group_size != -1 and k % group_size:
        raise InputError(f"{layer} has {k} inputs, not a multiple of group_size {group_size}; the format needs whole groups")
    groups = num_groups(k, group_size)
    if tensors.shapes[name] != (n, groups):
        raise InputError(
            f"{name} has shape {list(tensors.shapes[name])}; {n} outputs and {k} inputs in groups of {group_size} need "
            f"[{n}, {groups}]: group_size in config.json is not the one the layer was quantized with"
        )


def _scale_dtype(quantization: Mapping[str, Any], layers: Mapping[str, Any], tensors: StoredTensors) -> str:
    if quantization.get("quant_dtype") is not None:
        return quantization["quant_dtype"]
    stored = sorted({SCALE_TYPES[tensors.dtypes[f"{name}.{SCALES}"]] for name in layers})
    if len(stored) != 1:
        raise InputError(f"scales are of types {', '.join(stored)}; give quant_dtype in config.json, one of {QUANT_DTYPES}")
    return stored[0]


def _check_fused(layers: Mapping[str, Any], linears: set[str]) -> None:
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        for group in FUSED_LAYERS:
            missing = [member for member in group if f"{parent}.{member}" in linears and f"{parent}.{member}" not in layers]
            if leaf in group and missing:
                raise InputError(f"{name} is quantized but {', '.join(missing)} beside it is not; engines run them as one")
