"""kernels.lanes_ptx: its assembly, emulated, gives the levels of core.slicing for every code."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels
from matgptq_vllm.kernels import lanes_ptx
from matgptq_vllm.kernels.lanes_ptx import FACTOR, LaneCode, PtxCode, bits_needed, weights
from matgptq_vllm.kernels.layout import num_planes, to_kernel_layout
from matgptq_vllm.kernels.wide_ptx import WideCode

from .ptx_emulator import TYPES, emulate

LAYOUT = PlaneLayout()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_the_levels_of_the_rule(width: int, rule: SliceRule, dtype: str) -> None:
    codes = torch.randint(0, 256, (8, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    codes[0, :256] = torch.arange(256)
    planes, _ = to_kernel_layout(LAYOUT.split(codes), torch.ones(8, 4), LAYOUT, 512, 128)
    needed = planes[: num_planes(bits_needed(width, rule))]
    found = torch.zeros(16, 4, 4, 4, 4, 2, dtype=torch.float64)  # row, unit, piece, eight columns, j, column of j
    for unit, piece in itertools.product(range(4), range(4)):
        words = [plane[0, unit, :, piece if plane.shape[3] == 4 else piece // 2] for plane in needed]
        inputs = [word.numpy().view(np.uint32) for word in words]
        outputs = emulate(weights(width, piece % 2, rule, dtype), inputs, dtype)
        for number, output in enumerate(outputs):
            # Registers of the left operand: outputs g, then g + 8, of the lower columns, then of the upper.
            pairs = torch.from_numpy(output.view(np.int16)).view(TYPES[dtype]).double().view(8, 4, 2)
            product, upper, e = number // 4 % 2, number // 2 % 2, number % 2
            found[8 * e :, unit, piece, 2 * product + upper][:8] += pairs
    found = found.view(16, 512)[:8] * FACTOR[rule] * LaneCode(dtype).unit(width, rule)
    expected = levels(codes, width, rule).double()
    error = ((found - expected).norm() / expected.norm()).item()
    if rule == "curved":
        # Two terms of 2 bits are exact, other weights rounded once.
        assert error < (0.0 if width == 2 else 2e-3 if dtype == "bf16" else 3e-4) + 1e-12
    else:
        assert error == 0


@pytest.mark.parametrize("code", [LaneCode, WideCode])
def test_the_text_of_a_code_tells_all_its_assembly_and_can_be_written_as_json(
    code: type[PtxCode], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code("bf16")
    assert before != code("f16")
    assert json.loads(json.dumps(before)) == before
    module = code.__module__
    name = "weights" if code is LaneCode else "scaled_weights"
    original = getattr(sys.modules[module], name)
    monkeypatch.setattr(f"{module}.{name}", lambda *arguments: original(*arguments)._replace(text="nop;" + str(arguments)))
    lanes_ptx._digest.cache_clear()
    try:
        assert code("bf16") != before
    finally:
        lanes_ptx._digest.cache_clear()


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="f32"):
        LaneCode("f32")
