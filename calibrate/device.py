"""Which device to compute on."""

import torch

from matgptq_vllm.core.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device called ``name``: cpu, cuda, or auto for a GPU where there is one; InputError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch finds no NVIDIA GPU; use --device cpu")
    return torch.device(name)
