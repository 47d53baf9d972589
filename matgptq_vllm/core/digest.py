"""The digest by which a reader knows that a tensor is the one calibration wrote."""

import hashlib

import torch


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor, as hexadecimal: of ``dtype[shape]`` and a newline, then its bytes, row-major, little-endian.

    The bytes alone would not tell a [4, 8] tensor from an [8, 4] one, nor uint8 from int8.
    """
    header = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}\n"
    sha256 = hashlib.sha256(header.encode())
    sha256.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
