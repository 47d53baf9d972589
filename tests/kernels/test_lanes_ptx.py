"""kernels.lanes_ptx: its assembly, emulated, gives the levels of core.slicing for every code."""

import numpy as np
import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels
from matgptq_vllm.kernels.lanes_ptx import LaneCode, bits_needed, level_factor, weights
from matgptq_vllm.kernels.layout import num_planes, to_kernel_layout

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
    found = torch.empty(8, 512, dtype=torch.float64)
    for half in (0, 1):
        words = [(plane[0] if plane.dim() == 3 else plane[0, half])[:8].numpy().view(np.uint32) for plane in needed]
        for field, output in enumerate(emulate(weights(width, half, rule, dtype), words, dtype)):
            tile = torch.from_numpy(output.view(np.int16)).view(TYPES[dtype]).double()
            found[:, 32 * (8 * half + field) :][:, :32] = tile * level_factor(width, rule, dtype)
    expected = levels(codes, width, rule).double()
    error = ((found - expected).norm() / expected.norm()).item()
    if rule == "curved":
        # Levels that the type does not hold are rounded, and above 3 bits the curve is computed in it.
        assert error < (3e-3 if dtype == "bf16" else 4e-4)
    else:
        assert error == 0


def test_a_change_of_any_assembly_changes_the_key_of_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LaneCode("bf16").cache_key
    assert before != LaneCode("f16").cache_key
    monkeypatch.setattr(
        "matgptq_vllm.kernels.lanes_ptx.weights", lambda *arguments: weights(*arguments)._replace(text="nop;" + str(arguments))
    )
    assert LaneCode("bf16").cache_key != before


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="f32"):
        LaneCode("f32")
