"""What can be said of a parent before anything heavy is imported: whether it is one, and which profiles it holds.

The full reader, ``core.checkpoint``, needs torch; this one lets a command fail at once on a wrong folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.profile import PROFILES_FILE, Profile, all_profiles, profiles_from_json

MANIFEST_FILE = "matgptq_manifest.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ParentSummary:
    """A parent as far as its small files tell."""

    directory: Path
    spec: ParentSpec
    layers: tuple[str, ...]
    """Names of the quantized layers."""

    stored_profiles: tuple[Profile, ...]

    def profiles(self, max_width: int) -> list[Profile]:
        """Every profile that a replica of ``max_width`` can serve, in index order."""
        return all_profiles(self.layers, self.stored_profiles, max_width)


def read_parent_summary(directory: Path) -> ParentSummary:
    """The summary of the parent in ``directory``.

    Raises:
        InputError: there is no such folder.
        FormatError: it is not a parent, or one that was never finished, or its small files are damaged or disagree.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder; give the folder of a parent, as `matgptq calibrate --out` writes it")
    manifest = _read_json(directory / MANIFEST_FILE, "not a parent, or one whose calibration never finished")
    config = _read_json(directory / CONFIG_FILE, "not a Hugging Face model folder")
    try:
        spec = ParentSpec.from_dict(manifest["parent"], source=MANIFEST_FILE)
        layers = tuple(dict(manifest["layers"]))
        configured = dict(config.get("quantization_config") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{MANIFEST_FILE}: damaged ({type(error).__name__}: {error}); copy it again") from error
    if ParentSpec.from_dict(configured, source=CONFIG_FILE) != spec:
        raise FormatError(f"{CONFIG_FILE}: quantization_config differs from {MANIFEST_FILE}; one of them was altered")
    table = directory / PROFILES_FILE
    stored = profiles_from_json(_read_text(table), layers) if table.exists() else []
    return ParentSummary(directory, spec, layers, tuple(stored))


def _read_json(path: Path, without: str) -> dict[str, Any]:
    if not path.exists():
        raise FormatError(f"{path.parent}: has no {path.name}: {without}")
    try:
        document = json.loads(_read_text(path))
    except ValueError as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: holds {type(document).__name__}, an object was expected")
    return document


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read ({error}); copy it again") from error
