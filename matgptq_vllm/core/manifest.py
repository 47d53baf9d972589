"""The manifest: which layers a parent has, and a digest of every tensor. Its presence says that the parent is whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.parent import ParentSpec

MANIFEST_FILE = "matgptq_manifest.json"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
"""Hugging Face's index: tensor name -> file."""
PLANES_FOLDER = "planes"
"""Folder of the plane files. Not beside the others: tools that look at every safetensors file of a model folder, vLLM
among them, would open planes that a narrow replica never needs."""


@dataclass(frozen=True)
class Manifest:
    """What must be true of the files beside it."""

    spec: ParentSpec
    """Equal to the ``quantization_config`` in config.json."""

    layers: Mapping[str, tuple[int, int]]
    """Quantized layers in checkpoint order: name -> (N, K), outputs and inputs."""

    sha256: Mapping[str, str]
    """Tensor name -> ``digest`` of it."""

    def to_json(self) -> str:
        """The text of the manifest file."""
        document = {"parent": self.spec.to_dict(), "layers": dict(self.layers), "sha256": dict(self.sha256)}
        return json.dumps({**document, "checksum": _checksum(document)}, indent=1) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the parent in ``directory``, checked against its config.json.

    Raises:
        FormatError: there is none (not a parent, or one that was never finished), or the two files disagree.
    """
    document = _read_json(directory / MANIFEST_FILE, "not a parent, or one whose calibration never finished")
    config = _read_json(directory / CONFIG_FILE, "not a Hugging Face model folder")
    try:
        # The spec first: of a parent in another format, its version is the thing to say.
        spec = ParentSpec.from_dict(document["parent"], source=MANIFEST_FILE)
        if document.pop("checksum") != _checksum(document):
            raise FormatError(f"{MANIFEST_FILE}: its checksum is wrong, it was altered; copy it again")
        layers = {name: (int(shape[0]), int(shape[1])) for name, shape in document["layers"].items()}
        manifest = Manifest(spec, layers, dict(document["sha256"]))
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"{MANIFEST_FILE}: damaged ({type(error).__name__}: {error}); copy it again") from error
    quantization_config = config.get("quantization_config")
    if not isinstance(quantization_config, dict):
        raise FormatError(f"{CONFIG_FILE}: has no quantization_config, so this is not a parent; copy the file again")
    if ParentSpec.from_dict(quantization_config, source=CONFIG_FILE) != spec:
        raise FormatError(f"{CONFIG_FILE}: quantization_config differs from {MANIFEST_FILE}; one of them was altered")
    return manifest


def read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the Hugging Face index; FormatError if it is missing or damaged."""
    document = _read_json(directory / INDEX_FILE, "the parent is incomplete")
    index = document.get("weight_map")
    if not isinstance(index, dict) or not all(_is_weight_file(file) for file in index.values()):
        raise FormatError(
            f"{INDEX_FILE}: weight_map must map tensor names to files beside it or in {PLANES_FOLDER}/; copy it again"
        )
    return index


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _is_weight_file(file: object) -> bool:
    if not isinstance(file, str):
        return False
    name = file.removeprefix(f"{PLANES_FOLDER}/")
    return "/" not in name and "\\" not in name


def _read_json(path: Path, without: str) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path.parent}: has no {path.name}: {without}") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: holds {type(document).__name__}, an object was expected")
    return document
