"""core.manifest: a manifest's way through JSON."""

import hashlib
import json
from pathlib import Path

import pytest

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, Manifest, read_index, read_manifest
from matgptq_vllm.core.parent import ParentSpec


def make(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    (directory / CONFIG_FILE).write_text(json.dumps({"quantization_config": manifest.spec.to_dict()}))


def test_a_manifest_survives_json_with_the_order_of_its_layers(tmp_path: Path) -> None:
    layers = {"z": (3, 4), "a": (1, 130), "ж": (5, 5)}
    manifest = Manifest(ParentSpec("round", 64), layers, {"z.plane0": "00", "ж.scales": "ff"})
    make(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert list(read_manifest(tmp_path).layers) == list(layers)


def test_the_checksum_is_that_of_the_documented_text(tmp_path: Path) -> None:
    document = json.loads(Manifest(ParentSpec(), {"ж": (1, 2)}, {}).to_json())
    checksum = document.pop("checksum")
    text = json.dumps(document, sort_keys=True, separators=(", ", ": "), ensure_ascii=True)
    assert checksum == hashlib.sha256(text.encode("ascii")).hexdigest()


def test_another_version_is_named_before_anything_else_is_judged(tmp_path: Path) -> None:
    make(tmp_path, Manifest(ParentSpec(), {}, {}))
    document = json.loads((tmp_path / MANIFEST_FILE).read_text())
    document["parent"]["format_version"] = 1
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(FormatError, match="format_version is 1, this release reads 2"):
        read_manifest(tmp_path)


def test_an_index_maps_tensors_to_files(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text('{"metadata": {}, "weight_map": {"a": "x.safetensors"}}')
    assert read_index(tmp_path) == {"a": "x.safetensors"}
