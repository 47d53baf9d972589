"""The formats of an exported checkpoint: names and packing of a layer's tensors, and the ``quantization_config``.

Codes are packed into int32 words, 32 / bits to a word, the first in the lowest bits.

    format               tensor               type, shape                       packed along
    compressed-tensors   weight_packed        int32 [N, ceil(K bits / 32)]      K
    (pack-quantized)     weight_scale         [N, groups]
                         weight_shape         int64 [2]: N, K
                         weight_zero_point    int32 [ceil(N bits / 32), groups]  N; only where zero points vary
    gptq                 qweight              int32 [K bits / 32, N]            K
                         scales               [groups, N]
                         qzeros               int32 [groups, N bits / 32]       N; each holds the zero point less 1
                         g_idx                int32 [K]: group of every input

Weight: scale * (code - zero point). Both follow the readers in vLLM 0.26 to 0.32 and the compressed-tensors library 0.17.
"""

from collections.abc import Mapping
from typing import Any

import torch

from calibrate.exchange.integer_grid import GridFit
from matgptq_vllm.core.errors import InputError

COMPRESSED_TENSORS = "compressed-tensors"
WORD_BITS = 32


def has_zero_points(format: str, bits: int) -> bool:
    """Whether vLLM reads zero points other than the middle code from this format. At 8 bits they would gain nothing."""
    return format == COMPRESSED_TENSORS and bits == 4


def check_shape(format: str, name: str, shape: tuple[int, int], bits: int) -> None:
    """InputError unless the format can pack a layer of this shape (N, K)."""
    per_word = WORD_BITS // bits
    if format != COMPRESSED_TENSORS and any(size % per_word for size in shape):
        raise InputError(
            f"{name} is {shape[0]} x {shape[1]}; {format} packs {per_word} outputs and inputs to a word, so both must be "
            f"multiples of {per_word}: use --format {COMPRESSED_TENSORS}"
        )


def layer_tensors(format: str, fit: GridFit, bits: int) -> dict[str, torch.Tensor]:
    """Name within the layer -> tensor, of a layer without varying zero points."""
    n, k = fit.codes.shape
    if format == COMPRESSED_TENSORS:
        return {
            "weight_packed": pack(fit.codes, bits),
            "weight_scale": fit.scales,
            "weight_shape": torch.tensor([n, k], dtype=torch.int64),
        }
    groups = fit.scales.shape[1]
    return {
        "qweight": pack(fit.codes, bits).t(),
        "scales": fit.scales.t(),
        "qzeros": pack((fit.zeros - 1).t(), bits),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }


def zero_point_tensors(fit_zeros: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Name within the layer -> tensor of the zero points uint8 [N, groups] of a compressed-tensors layer."""
    return {"weight_zero_point": pack(fit_zeros.t(), bits).t()}


def layer_values(format: str, tensors: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Weights float32 [N, K] of a layer from its tensors as stored, by names within the layer."""
    if format == COMPRESSED_TENSORS:
        n, k = tensors["weight_shape"].tolist()
        codes, scales = unpack(tensors["weight_packed"], bits)[:, :k], tensors["weight_scale"]
        packed = tensors.get("weight_zero_point")
        middle = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
        zeros = middle if packed is None else unpack(packed.t(), bits)[:, :n].t()
    else:
        codes, scales = unpack(tensors["qweight"].t(), bits), tensors["scales"].t()
        zeros = unpack(tensors["qzeros"], bits).t() + 1
    return GridFit(codes, scales, zeros).values()


def quantization_config(format: str, bits: int, group_size: int, zero_points: bool, unquantized: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        group_size: inputs per scale; -1 is one scale per output channel.
        zero_points: whether zero points vary.
        unquantized: names of the linear layers that stay as they are.
    """
    if format != COMPRESSED_TENSORS:
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
        }
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": not zero_points,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": unquantized,
    }


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [R, C] -> int32 [R, ceil(C bits / 32)]; unused high bits are 0."""
    per_word = WORD_BITS // bits
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % per_word)).view(rows, -1, per_word).to(torch.int32)
    # Fields do not overlap, so the sum is their union; the highest field may set the sign bit, which int32 wraps into.
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    return (padded << shifts).sum(2, dtype=torch.int32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``pack``: int32 [R, W] -> codes uint8 [R, W 32 / bits]."""
    shifts = torch.arange(WORD_BITS // bits, dtype=torch.int32) * bits
    return ((words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
