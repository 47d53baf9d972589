"""kernels.expand_ptx: its arithmetic, emulated."""

import numpy as np
import pytest
import torch

from matgptq_vllm.kernels.expand_ptx import ADJACENT, scaled

from .ptx_emulator import TYPES, emulate


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_eight_values_are_scaled_in_float32_and_rounded_once(dtype: str, terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    numbers = (torch.randn(terms, 50, ADJACENT, generator=generator) * 100).half()
    scale = torch.rand(50, generator=generator)
    pairs = numbers.view(torch.int32).permute(0, 2, 1).reshape(4 * terms, 50).numpy().copy().view(np.uint32)
    outputs = emulate(scaled(dtype, terms), [*pairs, scale.numpy().view(np.uint32)], dtype)
    found = torch.from_numpy(np.stack(outputs, 1).copy().view(np.int16)).view(TYPES[dtype])
    expected = (numbers.float().sum(0) * scale[:, None]).to(TYPES[dtype])
    assert torch.equal(found, expected)
