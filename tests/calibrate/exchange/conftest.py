"""Checkpoints in the published format, made with arithmetic of their own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "dtype": "float16",
}
WIDTHS = (2, 3, 4, 6, 8)


def published_values(codes: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Weights float32 [N, K] at ``width`` by the published formula, in integers and float64."""
    q = codes.numpy().astype(np.int64)
    drop = 8 - width
    sliced = q >> drop
    if drop:
        sliced = np.clip(sliced + ((q >> (drop - 1)) & 1), 0, 2**width - 1)
    levels = (sliced << drop) - 128
    per_input = np.repeat(scales.double().numpy(), q.shape[1] // scales.shape[1], axis=1)
    return torch.from_numpy((levels * per_input).astype(np.float32))


def publish(
    source: Path,
    directory: Path,
    group_size: int = 32,
    quant_dtype: str = "float16",
    seed: int = 0,
    shards: int = 1,
    noise: bool = True,
) -> Path:
    """Write the model in ``source`` as the published packing script does, rounded to nearest; returns ``directory``.

    With ``noise``, one weight in eight gets a random code instead, so that every code and every rounding of it occurs.
    """
    shutil.copytree(source, directory)
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        if "_proj.weight" not in name:
            tensors[name] = weight
            continue
        n, k = weight.shape
        size = k if group_size == -1 else group_size
        grouped = weight.float().view(n, -1, size)
        scales = (grouped.abs().amax(2, keepdim=True) * 2 / 255).to(getattr(torch, quant_dtype))
        codes = (grouped / scales.float() + 128).round().clamp(0, 255).to(torch.uint8).view(n, k)
        if noise:
            replaced = torch.rand(n, k, generator=generator) < 1 / 8
            codes = torch.where(replaced, torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8), codes)
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.scales"] = scales.squeeze(2)
        tensors[f"{layer}.qweight"] = codes
    write_weights(directory, tensors, shards)
    edit_config(
        directory,
        {
            "group_size": group_size,
            "modules_to_not_convert": ["lm_head", "norm"],
            "master_bitwidth": 8,
            "inference_bitwidth": 4,
            "quant_method": "matgptq_quant",
            "quant_dtype": quant_dtype,
        },
    )
    return directory


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write ``tensors`` into one file, or dealt to several files with an index, so that a layer's parts lie apart."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    weight_map = {name: files[position % shards] for position, name in enumerate(tensors)}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(held, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of ``directory``."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def edit_config(directory: Path, quantization: dict[str, object]) -> None:
    """Set fields of the quantization_config; None removes the field."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    merged = {**config.get("quantization_config", {}), **quantization}
    config["quantization_config"] = {key: value for key, value in merged.items() if value is not None}
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session")
def plain_dir(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama model with whole groups of 32 inputs, and embeddings that are not tied."""
    return make_model(LlamaConfig(**SIZES, tie_word_embeddings=False))


@pytest.fixture
def make_published(plain_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Function from the options of ``publish`` to the folder of a published checkpoint."""
    return lambda **options: publish(plain_dir, tmp_path / "published", **options)


@pytest.fixture
def published_dir(make_published: Callable[..., Path]) -> Path:
    """A published checkpoint, free to be altered."""
    return make_published()
