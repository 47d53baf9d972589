"""kernels.digits_ptx: tables are near the levels of core.slicing, and the assembly, emulated, gives what the tables say."""

import itertools

import numpy as np
import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels
from matgptq_vllm.kernels.digits_ptx import (
    DIGIT_STEPS,
    digit_words,
    level_bytes,
    level_table,
    level_words,
    levels_by_sign,
    takes_digits,
)
from matgptq_vllm.kernels.lanes_ptx import bits_needed
from matgptq_vllm.kernels.layout import num_planes, to_kernel_layout

from .ptx_emulator import TYPES, emulate

LAYOUT = PlaneLayout()
CASES = [(width, rule) for width in (2, 3) for rule in SLICE_RULES if takes_digits(width, rule, False)]
OF_A_ROW = [(width, rule) for width in (2, 3, 4) for rule in SLICE_RULES if takes_digits(width, rule, True)]


def test_few_widths_take_digits() -> None:
    every = [(width, rule) for width in (2, 3, 4, 6, 8) for rule in SLICE_RULES]
    assert {case for case in every if bits_needed(*case) <= 3} == set(CASES)
    assert set(OF_A_ROW) - set(CASES) == {(4, "nested"), (4, "curved")}


@pytest.mark.parametrize(("width", "rule"), OF_A_ROW)
def test_sums_of_products_with_a_digit_stay_below_what_a_float_counts(width: int, rule: SliceRule) -> None:
    _, table = level_table(width, rule)
    assert 128 * 128 * max(map(abs, table)) < 1 << 22


@pytest.mark.parametrize(("width", "rule"), CASES)
def test_bytes_times_their_unit_are_the_levels_of_the_rule(width: int, rule: SliceRule) -> None:
    codes = torch.randint(0, 256, (16, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    codes[0, :256] = torch.arange(256)
    planes, _ = to_kernel_layout(LAYOUT.split(codes), torch.ones(16, 4), LAYOUT, 512, 128)
    needed = planes[: num_planes(bits_needed(width, rule))]
    found = torch.zeros(2, 8, 4, 4, 4, 2, 4, dtype=torch.float64)  # e, g, unit, piece, j, first four of its columns or others
    for unit, piece in itertools.product(range(4), range(4)):
        words = [plane[0, unit, :, piece if plane.shape[3] == 4 else piece // 2] for plane in needed]
        inputs = [word.numpy().view(np.uint32) for word in words]
        inputs += [np.full_like(inputs[0], word) for word in level_words(width, rule)]
        outputs = emulate(level_bytes(width, piece % 2, rule, False), inputs, "bf16")
        for number, output in enumerate(outputs):
            found[number % 2, :, unit, piece, :, number // 2] = torch.from_numpy(output.view(np.int8)).double().view(8, 4, 4)
    found = found.view(2, 8, 4, 4, 4, 2, 2, 2).permute(0, 1, 2, 3, 5, 6, 4, 7).reshape(16, 512)
    error = (found * level_table(width, rule)[0] / levels(codes, width, rule).double() - 1).nan_to_num()
    if rule == "curved":
        assert error.abs().max().item() < 8e-3
    else:
        assert torch.equal(found * level_table(width, rule)[0], levels(codes, width, rule).double())


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


@pytest.mark.parametrize("rule", ["curved", "nested"])
def test_magnitudes_of_4_bits_times_their_unit_are_near_the_levels_of_the_rule(rule: SliceRule) -> None:
    unit, integers = level_table(4, rule)
    exact = levels(torch.arange(128, 256, 16, dtype=torch.uint8), 4, rule).double()
    error = torch.tensor(integers).double() * unit - exact
    assert (error.abs() / exact).max() < (0.03 if rule == "curved" else 1e-12)
    # Weights of normal distribution, the greatest of 128 at the end of the scale.
    end = 192 if rule == "curved" else 128
    weights = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)).double().abs()
    nearest = (weights / weights.amax(1, keepdim=True) * end).unsqueeze(-1).sub(exact).abs().argmin(-1)
    assert error[nearest].square().mean().sqrt() < 0.0024 * exact[nearest].square().mean().sqrt()


@pytest.mark.parametrize(("width", "rule"), OF_A_ROW)
def test_pairs_of_outputs_give_the_sums_of_a_single_row(width: int, rule: SliceRule) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 256, (16, 128), dtype=torch.uint8, generator=generator)
    digits = torch.randint(-128, 128, (2, 4, 4, 2, 4), dtype=torch.int8, generator=generator)  # digit, piece, j, half, column
    planes, _ = to_kernel_layout(LAYOUT.split(codes), torch.ones(16, 1), LAYOUT, 128, 128)
    sums = torch.zeros(16, 8, dtype=torch.int64)  # rows of the left operand, columns of the right one
    by_sign = bits_needed(width, rule) == 4
    for piece in range(4):
        needed = planes[: num_planes(bits_needed(width, rule))]
        words = [plane[0, 0, :, piece if plane.shape[3] == 4 else piece // 2] for plane in needed]
        inputs = [word.numpy().view(np.uint32) for word in words]
        inputs += [np.full_like(inputs[0], word) for word in level_words(width, rule)]
        assembly = levels_by_sign(piece % 2) if by_sign else level_bytes(width, piece % 2, rule, True)
        outputs = [torch.from_numpy(output.view(np.int8)).view(8, 4, 4) for output in emulate(assembly, inputs, "bf16")]
        # 2 half + odd, upper or lower half of the left operand's rows, g, j, byte
        left = torch.stack(outputs if by_sign else [half for output in outputs for half in (output, 0 * output)])
        left = left.view(4, 2, 8, 4, 4)
        for half in (0, 1):
            right = torch.zeros(8, 4, 2, 4, dtype=torch.int64)  # column, j, odd, byte
            for digit in (0, 1):
                for e in (0, 1):
                    # Columns u of a lane, of which the odd ones have a word of their own, in the bytes of output + 8 or not.
                    right[2 * digit + e, :, :, e::2] = digits[digit, piece, :, half].view(4, 2, 2).transpose(1, 2).long()
            of_left = left[2 * half : 2 * half + 2].permute(1, 2, 3, 0, 4).reshape(16, 32).long()
            sums += of_left @ right.reshape(8, 32).T
    weights = (levels(codes, width, rule).double() / level_table(width, rule)[0]).round().long()
    by_column = digits.view(2, 4, 4, 2, 2, 2).permute(1, 3, 4, 2, 5, 0)
    exact = weights @ by_column.reshape(128, 2).long()
    assert not sums[:, 4:].any()
    assert by_sign or not sums[8:].any()
    sums = sums[:8] - sums[8:]
    assert torch.equal(torch.stack([sums[:, [0, 2]], sums[:, [1, 3]]]).view(16, 2), exact)
