"""Everything of a parent's folder that is not weights of linear layers: config, tokenizer, other weights, card, log."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calibrate.model_card import model_card
from calibrate.options import CalibrateOptions
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE
from matgptq_vllm.core.parent import ParentSpec

LOG_FILE = "calibration_log.json"
CARD_FILE = "README.md"

COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Files of the original folder that a parent needs too: tokenizer, chat template, generation defaults."""

COMPANION_STEMS = ("LICENSE", "NOTICE")


def check_target(directory: Path, overwrite: bool) -> bool:
    """Whether ``directory`` may be created or replaced; True if something there will be replaced.

    Raises:
        InputError: it exists and ``overwrite`` is not set, or it holds anything but a parent.
    """
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise InputError(f"{directory} is a file; give --out a folder to create")
    if not any(directory.iterdir()):
        return True
    if not (directory / MANIFEST_FILE).is_file():
        raise InputError(f"{directory} exists and is not a parent, so it is not replaced; choose another --out")
    if not overwrite:
        raise InputError(
            f"{directory} exists; choose another --out, or pass --overwrite to replace it when the new parent is whole"
        )
    return True


def other_weights(model: PreTrainedModel, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, in the stored type, of every weight that is not a quantized layer's; tied ones once.

    Args:
        quantized: names of the quantized layers; their biases are other weights.
    """
    persistent = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)
    for name, tensor in (*model.named_parameters(), *buffers):
        if name.removesuffix(".weight") not in quantized or not name.endswith(".weight"):
            yield name, tensor.to(model.config.dtype) if tensor.is_floating_point() else tensor


def write_companions(
    source: Path, directory: Path, spec: ParentSpec, options: CalibrateOptions, log: Mapping[str, Any]
) -> None:
    """Put config.json, tokenizer files, model card and log into the folder of a parent being written.

    Args:
        source: folder of the original model.
        log: content of the calibration log.
    """
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_json(directory / CONFIG_FILE, {**config, "quantization_config": spec.to_dict()})
    for path in sorted(source.iterdir()):
        if _is_companion(path):
            shutil.copyfile(path, directory / path.name)
    _write_json(directory / LOG_FILE, log)
    (directory / CARD_FILE).write_text(model_card(config, spec, options, log), encoding="utf-8")


def _is_companion(path: Path) -> bool:
    if not path.is_file() or path.name == CONFIG_FILE or path.name.endswith(".index.json"):
        return False
    return path.suffix in COMPANION_SUFFIXES or path.name.startswith(COMPANION_STEMS)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
