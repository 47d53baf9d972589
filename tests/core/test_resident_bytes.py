"""core.resident_bytes: what fits a budget, the bytes of known shapes, and that no tensor is read to know them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from matgptq_vllm.core.checkpoint import ParentReader, plane_name
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import Manifest
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.resident_bytes import ResidentBytes, resident_bytes, shown_bytes
from matgptq_vllm.core.summary import ParentSummary
from matgptq_vllm.kernels.layout import to_kernel_layout

GIB = 1 << 30

SOME = ResidentBytes(
    planes=(200, 100, 100, 200, 200), plane_widths=(2, 1, 1, 2, 2), slice_rule="nested", scales=10, unquantized=90
)

LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""Linear layers of a block of Llama-3.1-8B."""


def folder_of(folder: Path, layers: dict[str, tuple[int, int]], weights: dict[str, torch.Tensor], tied: bool = False) -> Path:
    """The small files of a parent, and the file of what is not quantized."""
    folder.mkdir()
    spec = ParentSpec()
    (folder / "matgptq_manifest.json").write_text(Manifest(spec, layers, {}).to_json())
    config = {"quantization_config": spec.to_dict(), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    index = {
        **dict.fromkeys(weights, "model.safetensors"),
        **{f"{name}.plane0": "planes/absent.safetensors" for name in layers},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(("max_width", "most_gib"), [(8, 6.7), (4, 3.5), (2, 1.9)])
@pytest.mark.parametrize("kernel_layout", [True, False])
def test_the_8b_shape_takes_no_more_than_promised(tmp_path, kernel_layout: bool, max_width: int, most_gib: float) -> None:
    layers = {f"model.layers.{block}.{name}": shape for block in range(32) for name, shape in LLAMA_8B.items()}
    found = resident_bytes(ParentSummary(folder_of(tmp_path / "parent", layers, {"norm": torch.ones(4)})), kernel_layout)
    weights = 32 * sum(n * k for n, k in LLAMA_8B.values())
    assert found.quantized(max_width) == weights * max_width // 8 + weights // 128 * 2
    assert found.quantized(max_width) <= most_gib * GIB


def test_the_kernel_layout_is_counted_with_its_padding(tmp_path) -> None:
    shapes = {"a.q_proj": (100, 640), "a.k_proj": (40, 640), "a.v_proj": (40, 640), "a.o_proj": (100, 96)}
    counted = resident_bytes(ParentSummary(folder_of(tmp_path / "parent", shapes, {"x": torch.ones(1)})), kernel_layout=True)
    layout = PlaneLayout()
    planes, scales = [0] * 5, 0
    for n, k in ((180, 640), (100, 96)):
        codes = layout.split(torch.zeros(n, k, dtype=torch.uint8))
        held, held_scales = to_kernel_layout(codes, torch.ones(n, -(-k // 128), dtype=torch.bfloat16), layout, k, 128)
        planes = [size + plane.nbytes for size, plane in zip(planes, held, strict=True)]
        scales += held_scales.nbytes
    assert (list(counted.planes), counted.scales) == (planes, scales)


def test_in_the_checkpoint_layout_it_is_what_the_reader_yields(parent: Path) -> None:
    reader = ParentReader(parent)
    found = resident_bytes(reader, kernel_layout=False)
    for width in WIDTHS:
        tensors = dict(reader.tensors(width))
        quantized = {f"{layer}.{part}" for layer in reader.layers for part in ("scales", *map(plane_name, range(5)))}
        assert found.quantized(width) == sum(tensor.nbytes for name, tensor in tensors.items() if name in quantized)


def test_other_weights_are_counted_as_the_engine_keeps_them(tmp_path) -> None:
    weights = {
        "model.embed_tokens.weight": torch.zeros(100, 8, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(100, 8, dtype=torch.bfloat16),
        "a.o_proj.scales": torch.zeros(8, 1, dtype=torch.bfloat16),
        "a.o_proj.bias": torch.zeros(8, dtype=torch.bfloat16),
    }
    layers = {"a.o_proj": (8, 128)}
    apart, tied = (ParentSummary(folder_of(tmp_path / str(value), layers, weights, value)) for value in (False, True))
    assert resident_bytes(apart, False).unquantized == 2 * 128 * 8 * 2 + 8 * 2
    assert resident_bytes(tied, False).unquantized == 128 * 8 * 2 + 8 * 2
    assert resident_bytes(tied, False, itemsize=4).unquantized == 2 * (128 * 8 * 2 + 8 * 2)


@pytest.mark.parametrize(
    ("budget", "limit", "width"), [(900, 8, 8), (899, 8, 6), (700, 8, 6), (499, 8, 3), (10**9, 4, 4), (300, 8, 2)]
)
def test_the_widest_that_fits_is_taken_and_the_reason_says_why(budget: int, limit: int, width: int) -> None:
    assert SOME.widest_within(budget, limit) == width
    reason = SOME.reason(budget, width, limit)
    assert reason.startswith(f"max width {width} takes {SOME.total(width)} bytes")
    assert ("it is the widest" in reason) == (width == limit)


def test_where_none_fits_the_error_names_the_smallest_that_does() -> None:
    with pytest.raises(
        InputError, match=r"budget 299 bytes .* max width 2 .* 300 bytes \(210 bytes quantized, 90 .* at least 300"
    ):
        SOME.widest_within(299, 8)


def test_the_rule_that_reads_a_bit_more_counts_it() -> None:
    rounding = ResidentBytes(SOME.planes, SOME.plane_widths, "round", SOME.scales, SOME.unquantized)
    assert [rounding.quantized(width) for width in WIDTHS] == [310, 410, 610, 810, 810]


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (6 * GIB, "6 GiB")])
def test_sizes_are_shown_in_the_largest_unit(size: int, text: str) -> None:
    assert shown_bytes(size) == text
