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


@pytest.mark.parametrize(("width", "rule"), CASES)
def test_pairs_of_outputs_give_the_sums_of_a_single_row(width: int, rule: SliceRule) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 256, (16, 128), dtype=torch.uint8, generator=generator)
    digits = torch.randint(-128, 128, (2, 4, 4, 2, 4), dtype=torch.int8, generator=generator)  # digit, piece, j, half, column
    planes, _ = to_kernel_layout(LAYOUT.split(codes), torch.ones(16, 1), LAYOUT, 128, 128)
    sums = torch.zeros(16, 8, dtype=torch.int64)  # rows of the left operand, columns of the right one
    for piece in range(4):
        needed = planes[: num_planes(bits_needed(width, rule))]
        words = [plane[0, 0, :, piece if plane.shape[3] == 4 else piece // 2] for plane in needed]
        inputs = [word.numpy().view(np.uint32) for word in words]
        inputs += [np.full_like(inputs[0], word) for word in level_words(width, rule)]
        outputs = emulate(level_bytes(width, piece % 2, rule, True), inputs, "bf16")
        left = torch.stack(
            [torch.from_numpy(output.view(np.int8)).view(8, 4, 4) for output in outputs]
        )  # 2 half + odd, g, j, byte
        for half in (0, 1):
            right = torch.zeros(8, 4, 2, 4, dtype=torch.int64)  # column, j, odd, byte
            for digit in (0, 1):
                for e in (0, 1):
                    # Columns u of a lane, of which the odd ones have a word of their own, in the bytes of output + 8 or not.
                    right[2 * digit + e, :, :, e::2] = digits[digit, piece, :, half].view(4, 2, 2).transpose(1, 2).long()
            # Rows 8 to 15 of the left operand are 0.
            of_left = left[2 * half : 2 * half + 2].permute(1, 2, 0, 3).reshape(8, 32).long()
            sums[:8] += of_left @ right.reshape(8, 32).T
    weights = (levels(codes, width, rule).double() / level_table(width, rule)[0]).round().long()
    exact = weights @ digits.permute(1, 2, 3, 4, 0).reshape(128, 2).long()
    found = torch.stack([sums[:8, [0, 2]], sums[:8, [1, 3]]]).view(16, 2)
    assert torch.equal(found, exact)
    assert not sums[:8, 4:].any()
