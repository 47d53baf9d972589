"""Bytes of weights that a replica holds, by its max width, from the manifest and the headers of weight files alone.

They are those of one whole copy of the model: with tensor parallelism its workers hold them together (repeated key/value
heads aside). Counted is every weight, as the engine keeps it:

    planes up to the max width, and scales   padded where the kernels run (``core.shapes``), else as in the checkpoint
    embeddings, head, norms, biases          as stored; rows of a vocabulary rounded up to VOCABULARY_ROWS; a tied head once

Not counted is what is no weight: the KV cache, activations, CUDA graphs, and the buffers of the kernels.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.manifest import CONFIG_FILE, PLANES_FOLDER, read_index
from matgptq_vllm.core.parent import SCALES
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.profile import FUSED_LAYERS
from matgptq_vllm.core.safetensors_header import read_header
from matgptq_vllm.core.shapes import (
    KERNEL_PLANE_WIDTHS,
    bits_read,
    kernel_plane_shapes,
    kernel_scales_shape,
    leading_planes,
)
from matgptq_vllm.core.storage import plane_bytes, scale_bytes
from matgptq_vllm.core.summary import ParentSummary

VOCABULARY_ROWS = 64
"""vLLM rounds the rows of an embedding and of a head up to a multiple of this."""

VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes that one copy of a model takes."""

    planes: tuple[int, ...]
    """Of every plane as it is held, over all layers, most significant first."""

    plane_widths: tuple[int, ...]
    """Bits of those planes."""

    slice_rule: str
    scales: int
    unquantized: int

    def quantized(self, max_width: int) -> int:
        """Planes up to ``max_width`` and scales."""
        count = leading_planes(self.plane_widths, bits_read(max_width, self.slice_rule))
        return sum(self.planes[:count]) + self.scales

    def total(self, max_width: int) -> int:
        """All weights at ``max_width``."""
        return self.quantized(max_width) + self.unquantized

    def widest_within(self, budget: int, max_width: int) -> int:
        """The widest width, ``max_width`` at most, whose weights take at most ``budget`` bytes; InputError if none do."""
        fitting = [width for width in WIDTHS if width <= max_width and self.total(width) <= budget]
        if not fitting:
            smallest = self.total(WIDTHS[0])
            raise InputError(
                f"memory budget {shown_bytes(budget)} is too small: at max width {WIDTHS[0]} the weights take "
                f"{shown_bytes(smallest)} ({shown_bytes(self.quantized(WIDTHS[0]))} quantized, "
                f"{shown_bytes(self.unquantized)} embeddings, head and norms); give at least {smallest} bytes"
            )
        return max(fitting)

    def reason(self, budget: int, max_width: int, limit: int) -> str:
        """Why ``max_width`` is what ``budget`` allows, where ``limit`` is the widest that was asked for; one sentence."""
        text = f"max width {max_width} takes {shown_bytes(self.total(max_width))} of the memory budget {shown_bytes(budget)}"
        wider = [width for width in WIDTHS if max_width < width <= limit]
        return f"{text}; {wider[0]} would take {shown_bytes(self.total(wider[0]))}" if wider else f"{text}; it is the widest"


def resident_bytes(parent: ParentSummary, kernel_layout: bool, itemsize: int | None = None) -> ResidentBytes:
    """What a replica of ``parent`` holds.

    Args:
        kernel_layout: whether the kernels run, so that layers are in their layout.
        itemsize: bytes of a weight that is not quantized, where the engine converts them; None: as stored.

    Raises:
        FormatError: a file of the parent is missing or damaged.
    """
    quantized = _in_kernel_layout(parent) if kernel_layout else _in_checkpoint_layout(parent)
    return ResidentBytes(*quantized[:2], parent.spec.slice_rule, quantized[2], _unquantized(parent, itemsize))


def shown_bytes(size: int) -> str:
    """``size`` for people: the largest binary unit of which there is one, three significant digits."""
    power = min(max(0, (max(size, 1).bit_length() - 1) // 10), 4)
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _in_checkpoint_layout(parent: ParentSummary) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(plane_bytes(parent)), parent.spec.plane_widths, scale_bytes(parent)


def _in_kernel_layout(parent: ParentSummary) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    planes = [0] * len(KERNEL_PLANE_WIDTHS)
    scales = 0
    for n, k in _fused_shapes(parent):
        for plane, shape in enumerate(kernel_plane_shapes(n, k)):
            planes[plane] += 4 * math.prod(shape)
        itemsize = 2 if parent.spec.scale_dtype == "bfloat16" else 4
        scales += math.prod(kernel_scales_shape(n, k, parent.spec.group_size)) * itemsize
    return tuple(planes), KERNEL_PLANE_WIDTHS, scales


def _fused_shapes(parent: ParentSummary) -> Iterator[tuple[int, int]]:
    """(N, K) of the layers as the engine runs them: some of the parent's as one."""
    outputs: dict[str, int] = {}
    inputs: dict[str, int] = {}
    for name, (n, k) in parent.layers.items():
        prefix, _, leaf = name.rpartition(".")
        fused = next((f"{prefix}.{group[0]}" for group in FUSED_LAYERS if leaf in group), name)
        outputs[fused] = outputs.get(fused, 0) + n
        inputs[fused] = k
    return ((outputs[name], inputs[name]) for name in outputs)


def _unquantized(parent: ParentSummary, itemsize: int | None) -> int:
    total = 0
    tied = _has_tied_head(parent.directory)
    quantized = {f"{layer}.{SCALES}" for layer in parent.layers}
    for file in sorted({file for file in read_index(parent.directory).values() if not file.startswith(f"{PLANES_FOLDER}/")}):
        for name, entry in read_header(parent.directory, file).items():
            if name in quantized or (tied and name.endswith(TIED_HEAD)):
                continue
            size = entry.nbytes if itemsize is None else entry.numel * itemsize
            if name.endswith(VOCABULARY_WEIGHTS):
                rows = entry.shape[0]
                size = size // rows * (-(-rows // VOCABULARY_ROWS) * VOCABULARY_ROWS)
            total += size
    return total


def _has_tied_head(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get("tie_word_embeddings", False))
    except (OSError, ValueError, AttributeError) as error:
        raise FormatError(f"{CONFIG_FILE}: cannot be read ({error}); copy it again") from error
