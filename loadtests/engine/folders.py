"""Model folders without weights, for vLLM's load format ``dummy``."""

import json
from pathlib import Path
from typing import Any

from loadtests.engine.shapes import Shape
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, Manifest
from matgptq_vllm.core.parent import ParentSpec

GROUP_SIZE = 128
"""Weights per scale, ours and the peers': the same bytes of scales for all."""


def write_parent(shape: Shape, rule: str, folder: Path) -> None:
    """A parent whose manifest and index list no tensor: it can be served with random weights, not read."""
    spec = ParentSpec(slice_rule=rule, group_size=GROUP_SIZE)
    _write_config(hf_config(shape, spec.to_dict()), folder)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {}}), encoding="utf-8")
    (folder / MANIFEST_FILE).write_text(Manifest(spec, shape.linear_layers(), {}).to_json(), encoding="utf-8")


def write_peer(shape: Shape, bits: int, folder: Path) -> None:
    """A model of stock vLLM: bfloat16 (16 bits), or packed integers with a scale per group (4 or 8)."""
    _write_config(peer_config(shape, bits), folder)


def peer_config(shape: Shape, bits: int) -> dict[str, Any]:
    """config.json of a model of stock vLLM."""
    # Of the formats for packed integers, vLLM looks into the weight files of some, and serves without quantization if there
    # are none; of this one it reads the configuration alone.
    quantization = None if bits == 16 else {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE,
                    "dynamic": False,
                },
            }
        },
    }  # fmt: skip
    return hf_config(shape, quantization)


def hf_config(shape: Shape, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """config.json with a quantization's description."""
    return shape.hf_config() | ({} if quantization is None else {"quantization_config": quantization})


def _write_config(config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
