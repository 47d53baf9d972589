"""kernels.expand_ptx: its arithmetic, emulated."""

import numpy as np
import pytest
import torch

from matgptq_vllm.kernels.expand_ptx import ADJACENT, exchanged, scaled

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


def test_lanes_that_share_a_row_exchange_their_pairs_so_that_each_has_adjacent_ones() -> None:
    lane = np.arange(32, dtype=np.uint32)
    # The word of lane j for the q-th eight columns: number 4q + j of the row's words.
    given = [lane // 4 * 16 + 4 * q + lane % 4 for q in range(4)]
    outputs = emulate(exchanged(), [*given, lane], "bf16")
    assert [words.tolist() for words in outputs] == [(lane // 4 * 16 + lane % 4 * 4 + index).tolist() for index in range(4)]
