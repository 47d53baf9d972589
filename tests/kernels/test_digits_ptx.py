"""kernels.digits_ptx: tables are near the levels of core.slicing, and the assembly, emulated, gives what the tables say."""

import itertools

import numpy as np
import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels
from matgptq_vllm.kernels.digits_ptx import DIGIT_STEPS, digit_words, level_bytes, level_table, level_words, takes_digits
from matgptq_vllm.kernels.lanes_ptx import bits_needed
from matgptq_vllm.kernels.layout import num_planes, to_kernel_layout

from .ptx_emulator import TYPES, emulate

LAYOUT = PlaneLayout()
CASES = [(width, rule) for width in (2, 3) for rule in SLICE_RULES if takes_digits(width, rule)]


def test_few_widths_take_digits() -> None:
    assert {(width, rule) for width in (2, 3, 4, 6, 8) for rule in SLICE_RULES if bits_needed(width, rule) <= 3} == set(CASES)


@pytest.mark.parametrize(("width", "rule"), CASES)
def test_sums_of_products_with_a_digit_stay_below_what_a_float_counts(width: int, rule: SliceRule) -> None:
    _, table = level_table(width, rule)
    assert 128 * 128 * max(map(abs, table)) < 1 << 22


@pytest.mark.parametrize(("width", "rule"), CASES)
def test_bytes_times_their_unit_are_the_levels_of_the_rule(width: int, rule: SliceRule) -> None:
    codes = torch.randint(0, 256, (16, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    codes[0, :256] = torch.arange(256)
    planes, _ = to_kernel_layout(LAYOUT.split(codes), torch.ones(16, 4), LAYOUT, 512, 128)
    needed = planes[: num_planes(bits_needed(width, rule))]
    found = torch.zeros(2, 8, 4, 4, 4, 2, 4, dtype=torch.float64)  # e, g, unit, piece, j, columns 0-3 or 4-7
    for unit, piece in itertools.product(range(4), range(4)):
        words = [plane[0, unit, :, piece if plane.shape[3] == 4 else piece // 2] for plane in needed]
        inputs = [word.numpy().view(np.uint32) for word in words]
        inputs += [np.full_like(inputs[0], word) for word in level_words(width, rule)]
        outputs = emulate(level_bytes(width, piece % 2, rule, False), inputs, "bf16")
        for number, output in enumerate(outputs):
            found[number % 2, :, unit, piece, :, number // 2] = torch.from_numpy(output.view(np.int8)).double().view(8, 4, 4)
    error = (found.view(16, 512) * level_table(width, rule)[0] / levels(codes, width, rule).double() - 1).nan_to_num()
    if rule == "curved":
        assert error.abs().max().item() < 4e-3
    else:
        assert torch.equal(found.view(16, 512) * level_table(width, rule)[0], levels(codes, width, rule).double())


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_two_digits_are_a_number_in_steps(dtype: str) -> None:
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(TYPES[dtype])
    numbers[:2] = torch.tensor([1.0, -1.0]) * numbers.abs().max()
    per_unit = (DIGIT_STEPS / numbers.abs().max().float()).expand(512).numpy().view(np.uint32)
    words = numbers.view(torch.int16).numpy().view(np.uint32).reshape(512, 4)
    outputs = emulate(digit_words(dtype), [*words.T.copy(), *[per_unit] * 4], dtype)
    upper, lower = (
        torch.from_numpy(np.stack(outputs[start : start + 2], axis=1).view(np.int8)).double().flatten() for start in (0, 2)
    )
    exact = numbers.double() * DIGIT_STEPS / numbers.abs().max().double()
    assert (256 * upper + lower - exact).abs().max() < 0.51
    assert upper.abs().max() == 127
