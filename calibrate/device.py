"""Which device to compute on, and in which type."""

import torch

from matgptq_vllm.core.errors import InputError

LARGE_HIDDEN = 2048
"""Width of the hidden states from which a model counts as large."""


def resolve_device(name: str) -> torch.device:
    """The device called ``name``: cpu, cuda, or auto for a GPU where there is one; InputError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch finds no NVIDIA GPU; use --device cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device, hidden_size: int) -> torch.dtype:
    """The type called ``name``: auto is bfloat16 for a large model on a GPU, where float32 would cost too much time."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and hidden_size >= LARGE_HIDDEN else torch.float32
    return getattr(torch, name)
