"""Packing, against the compressed-tensors library and against arithmetic on Python integers."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

from calibrate.exchange import formats
from calibrate.exchange.integer_grid import GridFit
from matgptq_vllm.core.errors import InputError


def random_fit(n, k, group_size, bits, zero_points, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group_size, generator=generator).bfloat16()
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    if zero_points:
        zeros = torch.randint(0, 1 << bits, scales.shape, generator=generator, dtype=torch.uint8)
    return GridFit(codes, scales, zeros)


@pytest.mark.parametrize(("n", "k", "group_size"), [(8, 64, 32), (5, 96, 32), (17, 128, 64), (3, 36, 36)])
@pytest.mark.parametrize(("bits", "zero_points"), [(4, False), (4, True), (8, False)])
def test_compressed_tensors_layers_are_read_by_its_library(n, k, group_size, bits, zero_points):
    fit = random_fit(n, k, group_size, bits, zero_points)
    tensors = formats.layer_tensors("compressed-tensors", fit, bits)
    if zero_points:
        tensors |= formats.zero_point_tensors(fit.zeros, bits)
    document = formats.quantization_config("compressed-tensors", bits, group_size, zero_points, ["lm_head"])
    config = QuantizationConfig.model_validate(document)
    scheme = config.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    assert set(PackedQuantizationCompressor.compression_param_names(scheme)) == tensors.keys()
    read = PackedQuantizationCompressor.decompress({name: tensor.contiguous() for name, tensor in tensors.items()}, scheme)
    # The library computes in the type of the scales.
    expected = fit.values().bfloat16().float()
    assert torch.equal(read["weight"].float(), expected)
    assert torch.equal(formats.layer_values("compressed-tensors", tensors, bits), fit.values())


@pytest.mark.parametrize(("n", "k", "group_size"), [(8, 64, 32), (24, 96, 32), (16, 128, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_layers_hold_what_the_format_says(n, k, group_size, bits):
    fit = random_fit(n, k, group_size, bits, zero_points=False)
    tensors = formats.layer_tensors("gptq", fit, bits)
    per_word, top = 32 // bits, (1 << bits) - 1
    assert tensors["qweight"].shape == (k // per_word, n)
    assert tensors["qzeros"].shape == (k // group_size, n // per_word)
    assert tensors["scales"].shape == (k // group_size, n)
    words, zeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    group_of = tensors["g_idx"].tolist()
    values = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            code = ((words[column // per_word][row] & 0xFFFFFFFF) >> (bits * (column % per_word))) & top
            group = group_of[column]
            zero = (((zeros[group][row // per_word] & 0xFFFFFFFF) >> (bits * (row % per_word))) & top) + 1
            values[row, column] = (code - zero) * tensors["scales"][group][row].float()
    assert torch.equal(values, fit.values())
    assert torch.equal(formats.layer_values("gptq", tensors, bits), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_unpacking_undoes_packing_and_unused_bits_are_zero(bits, columns):
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns))
    unpacked = formats.unpack(formats.pack(codes, bits), bits)
    assert torch.equal(unpacked[:, :columns], codes)
    assert not unpacked[:, columns:].any()


def test_gptq_takes_whole_words_only():
    formats.check_shape("compressed-tensors", "a", (5, 32), 4)
    formats.check_shape("gptq", "a", (4, 32), 8)
    with pytest.raises(InputError, match="a is 5 x 32; gptq packs 8 outputs and inputs to a word"):
        formats.check_shape("gptq", "a", (5, 32), 4)
