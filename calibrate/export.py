"""Everything of a parent's folder that is not weights of linear layers: config, tokenizer, other weights, card, log."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibrate.model_card import CARD_FILE, model_card
from calibrate.options import CalibrateOptions
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.folder_swap import restore_interrupted
from matgptq_vllm.core.manifest import CONFIG_FILE, MANIFEST_FILE
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.quality import QUALITY_FILE

LOG_FILE = "calibration_log.json"

COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Files of the original folder that a parent needs too: tokenizer, chat template, generation defaults."""

COMPANION_STEMS = ("LICENSE", "NOTICE")

OWN_FILES = (CONFIG_FILE, MANIFEST_FILE, PROFILES_FILE, QUALITY_FILE, LOG_FILE)
"""Files that every folder has of its own."""


def check_target(directory: Path, overwrite: bool, marker: str = MANIFEST_FILE, kind: str = "parent") -> bool:
    """Whether ``directory`` may be created or replaced; True if something there will be replaced.

    An old folder that an interrupted replacement left under another name gets its name back first.

    Args:
        marker: file by which a folder of this kind is known.
        kind: what such a folder is called in messages.

    Raises:
        InputError: it exists and ``overwrite`` is not set, or it holds anything but a folder of this kind.
    """
    restore_interrupted(directory)
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise InputError(f"{directory} is a file; give --out a folder to create")
    if not any(directory.iterdir()):
        return True
    if not (directory / marker).is_file():
        raise InputError(f"{directory} exists and is not a {kind}, so it is not replaced; choose another --out")
    if not overwrite:
        raise InputError(
            f"{directory} exists; choose another --out, or pass --overwrite to replace it when the new {kind} is whole"
        )
    return True


def is_companion(path: Path) -> bool:
    """Whether a file of the original folder belongs into a parent as it is: tokenizer, chat template, licence."""
    if not path.is_file() or path.name in OWN_FILES or path.name.endswith(".index.json"):
        return False
    return path.suffix in COMPANION_SUFFIXES or path.name.startswith(COMPANION_STEMS)


def write_companions(
    source: Path, directory: Path, spec: ParentSpec, options: CalibrateOptions, log: Mapping[str, Any]
) -> None:
    """Put config.json, tokenizer files, model card and log into the folder of a parent being written.

    Args:
        source: folder of the original model.
        log: content of the calibration log.
    """
    config = write_config(source, directory, spec.to_dict())
    _write_json(directory / LOG_FILE, log)
    (directory / CARD_FILE).write_text(model_card(config, spec, options, log), encoding="utf-8")


def write_config(source: Path, directory: Path, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Put config.json with this ``quantization_config``, tokenizer files and licences into a folder being written.

    Args:
        source: folder of the model, original or quantized.

    Returns:
        config.json of ``source``.
    """
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    _write_json(directory / CONFIG_FILE, {**config, "quantization_config": dict(quantization_config)})
    for path in sorted(source.iterdir()):
        if is_companion(path):
            shutil.copyfile(path, directory / path.name)
    return config


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
