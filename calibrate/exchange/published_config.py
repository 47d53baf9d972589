"""The ``quantization_config`` of the published MatGPTQ plugin: which of them a parent can stand for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import CONFIG_FILE
from matgptq_vllm.core.parent import GROUP_SIZES
from matgptq_vllm.core.precision import PARENT_WIDTH

PUBLISHED_METHOD = "matgptq_quant"

DEFAULT_GROUP_SIZE = 128
"""The published plugin's, where config.json names none."""

QUANT_DTYPES = ("float16", "bfloat16")

KNOWN_FIELDS = {
    *("quant_method", "group_size", "master_bitwidth", "inference_bitwidth", "quant_dtype", "modules_to_not_convert"),
    *("sym", "symmetric", "desc_act", "act_order"),
}


def read_published_config(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and its quantization_config.

    Raises:
        InputError: there is none, or it is not of the published method.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG_FILE}: not a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a JSON object ({error}); copy it again") from error
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != PUBLISHED_METHOD:
        raise InputError(
            f"{path}: quant_method is {method!r}, import reads {PUBLISHED_METHOD!r}; pack the model with the published "
            "packing script first, or calibrate the original model"
        )
    return config, quantization


def check_quantization(quantization: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Group size, and ends of names of modules that stay as they are.

    Raises:
        InputError: a field that is unknown or out of range, or that means something no parent can.
    """
    unknown = sorted(quantization.keys() - KNOWN_FIELDS)
    if unknown:
        raise InputError(f"quantization_config has unknown fields {unknown}; what they change is not known, so it is refused")
    if quantization.get("master_bitwidth") != PARENT_WIDTH:
        raise InputError(
            f"master_bitwidth is {quantization.get('master_bitwidth')!r}; a parent has codes of {PARENT_WIDTH} bits: "
            f"quantize with a master width of {PARENT_WIDTH}"
        )
    for name, plain in (("sym", True), ("symmetric", True), ("desc_act", False), ("act_order", False)):
        if quantization.get(name, plain) is not plain:
            raise InputError(
                f"{name} is {quantization[name]!r}; the format stores neither zero points nor an order of the inputs, so "
                "only symmetric codes in the model's order have a meaning: quantize with --sym and without --act_order"
            )
    width = quantization.get("inference_bitwidth")
    if type(width) is not int or not 1 <= width <= PARENT_WIDTH:
        raise InputError(f"inference_bitwidth is {width!r}; it must be an integer from 1 to {PARENT_WIDTH}")
    group_size = quantization.get("group_size", DEFAULT_GROUP_SIZE)
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise InputError(f"group_size is {group_size!r}; parents have one of {', '.join(map(str, GROUP_SIZES))}")
    dtype = quantization.get("quant_dtype")
    if dtype is not None and dtype not in QUANT_DTYPES:
        raise InputError(f"quant_dtype is {dtype!r}; the published plugin knows {', '.join(QUANT_DTYPES)}")
    not_converted = quantization.get("modules_to_not_convert") or []
    if not isinstance(not_converted, list) or not all(isinstance(suffix, str) for suffix in not_converted):
        raise InputError(f"modules_to_not_convert is {not_converted!r}; it must be a list of ends of module names")
    return group_size, tuple(not_converted)
