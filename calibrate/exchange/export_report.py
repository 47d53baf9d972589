"""What an export did: sizes, and how far the checkpoint is from the slice."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EXPORT_FILE = "matgptq_export.json"
"""The report within the checkpoint; by it a folder is known as one that export wrote."""


@dataclass(frozen=True)
class ExportReport:
    """The result of one export."""

    parent: str
    checkpoint: str
    precision: str
    """Profile that was exported."""
    format: str
    bits: int
    """Bits stored per weight."""
    group_size: int
    zero_points: bool
    """Whether zero points vary."""
    scale_dtype: str
    layers: int
    inexact_layers: int
    """Layers whose weights differ from the slice's."""
    exact_bits: int | None
    """Bits that would hold the slice exactly, where these do not and those the formats have do."""
    fit: str
    """What the inexact layers are nearest to: slice or parent."""
    weight_bytes: int
    """Bytes of the quantized layers' tensors."""
    slice_error: float
    """Sum of squared differences from the slice's weights, over the sum of their squares, mean over the layers."""
    parent_error: float
    """Likewise from the parent's 8-bit weights."""
    slice_parent_error: float
    """That of the slice itself, from the parent's 8-bit weights."""
    slice_perplexity: float | None = None
    perplexity: float | None = None
    """Perplexities of slice and checkpoint on the text given, if one was."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Every layer's share of ``slice_error``."""

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    def as_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def as_text(self) -> str:
        """The report for a terminal."""
        zeros = "a zero point per group" if self.zero_points else "symmetric"
        size = "one scale per output channel" if self.group_size == -1 else f"group size {self.group_size}"
        lines = [
            f"wrote {self.checkpoint}: precision {self.precision} of {self.parent} as {self.format}, "
            f"{self.bits} bits per weight, {size}, {zeros}, {self.weight_bytes / 2**20:.2f} MiB in {self.layers} layers"
        ]
        if not self.inexact_layers:
            lines.append(f"exact: every weight is that of the slice (scales are {self.scale_dtype}: run it in that type)")
        else:
            target = "the parent's 8-bit weights" if self.fit == "parent" else "the slice's weights"
            lines += [
                f"not exact: {self.bits} bits cannot hold the slice of {self.inexact_layers} layers; they were rounded to the "
                f"grid points nearest to {target}",
                f"relative squared error: {self.slice_error:.3g} from the slice; from the parent's 8-bit weights "
                f"{self.parent_error:.3g}, the slice's own is {self.slice_parent_error:.3g}",
            ]
            if self.exact_bits:
                lines.append(f"--bits {self.exact_bits} holds this slice exactly")
        if self.perplexity is not None:
            lines.append(f"perplexity: {self.slice_perplexity:.3f} of the slice, {self.perplexity:.3f} of the checkpoint")
        return "\n".join(lines)
