"""What is measured: a parent at one profile after another, or a plain model as it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from calibrate.evaluate.resident_parent import ResidentParent
from calibrate.evaluate.sliced_model import load_profile_model, set_profile
from calibrate.model import find_blocks, load_model
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.storage import profile_bytes


@dataclass(frozen=True)
class Subject:
    """A model ready to measure; the next subject may be the same object with other weights."""

    model: PreTrainedModel
    """In float32."""
    precision: str
    """Profile name; the stored type of the weights for a plain model."""
    bits_per_weight: float
    weight_bytes: int
    """Of the layers that are, or would be, quantized."""


def parent_subjects(reader: ResidentParent, profiles: Sequence[Profile], device: torch.device) -> Iterator[Subject]:
    """The parent at each of ``profiles`` in turn."""
    model: Any = load_profile_model(reader, profiles[0])
    model.to(device)
    num_weights = reader.num_weights
    for index, profile in enumerate(profiles):
        if index:
            set_profile(model, reader, profile)
        yield Subject(model, profile.name, profile.average_bits(num_weights), profile_bytes(reader, profile))


def plain_subjects(directory: Path, device: torch.device) -> Iterator[Subject]:
    """The model in a Hugging Face folder, alone."""
    model: Any = load_model(directory)
    stored_dtype = model.dtype
    weight_bytes = sum(linear.weight.nbytes for block in find_blocks(model) for linear in block.linears.values())
    model.to(device=device, dtype=torch.float32)
    yield Subject(model, str(stored_dtype).removeprefix("torch."), 8.0 * stored_dtype.itemsize, weight_bytes)
