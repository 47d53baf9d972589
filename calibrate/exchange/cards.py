"""Model cards of imported parents and of exported checkpoints."""

from collections.abc import Mapping
from typing import Any

from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.precision import WIDTHS

IMPORT_CARD = """\
---
library_name: vllm
tags: [matgptq, quantized]
---
# {name}, a MatGPTQ parent

One checkpoint of 8-bit codes. A reader takes the top {widths} or 8 bits of every weight; each width is a model of its own.
Imported from a checkpoint in the format of the published method (MatGPTQ, arXiv 2602.03537): codes and scales are that
checkpoint's, and every width has the weights that the published method gives it.

| | |
|---|---|
| model type | {model_type} |
| blocks | {num_layers} |
| slice rule | {slice_rule} |
| group size | {group_size} |
| scales | {scale_dtype} |

Serve it: `vllm serve DIR`, or `matgptq serve DIR` for a precision per request. Measure it: `matgptq evaluate DIR --text FILE`.
"""

EXPORT_CARD = """\
---
library_name: vllm
tags: [{format}, quantized]
---
# {name} at precision {precision}, {bits} bits per weight

A checkpoint in the format {format}, exported from the MatGPTQ parent `{name}`: its slice at precision {precision}.
Group size {group_size}, {zero_points}. {exactness}

Serve it: `vllm serve DIR --dtype {scale_dtype}` (scales are stored in that type). How far every layer is from the slice is
in `matgptq_export.json`.
"""


def import_card(name: str, config: Mapping[str, Any], spec: ParentSpec) -> str:
    """The text of README.md of a parent imported from the folder ``name``, whose config.json is ``config``."""
    return IMPORT_CARD.format(
        name=name,
        widths=", ".join(str(width) for width in WIDTHS if width != 8),
        model_type=config.get("model_type", "unknown"),
        num_layers=config.get("num_hidden_layers", "?"),
        slice_rule=spec.slice_rule,
        group_size="one per output channel" if spec.group_size == -1 else spec.group_size,
        scale_dtype=spec.scale_dtype,
    )


def export_card(name: str, report: Mapping[str, Any]) -> str:
    """The text of README.md of a checkpoint exported from the parent ``name``; ``report`` is the export's report."""
    inexact = report["inexact_layers"]
    return EXPORT_CARD.format(
        name=name,
        precision=report["precision"],
        bits=report["bits"],
        format=report["format"],
        group_size="one per output channel" if report["group_size"] == -1 else report["group_size"],
        zero_points="a zero point per group" if report["zero_points"] else "symmetric",
        exactness=(
            "All weights are exactly those of the slice."
            if not inexact
            else f"The format cannot hold the slice of {inexact} of {report['layers']} layers; they hold the nearest weights."
        ),
        scale_dtype=report["scale_dtype"],
    )
