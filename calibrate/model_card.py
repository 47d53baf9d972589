"""The model card of a parent: what it is, how it was made, how to serve it."""

from collections.abc import Mapping
from typing import Any

from calibrate.options import CalibrateOptions
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.precision import WIDTHS

CARD = """\
---
library_name: vllm
tags: [matgptq, quantized]
---
# {name}, a MatGPTQ parent

One checkpoint of 8-bit codes. A reader takes the top {widths} or 8 bits of every weight; each width is a model of its own.
Quantized from a `{model_type}` model: all linear layers of its {num_layers} blocks.

| | |
|---|---|
| method | {method} |
| slice rule | {slice_rule} |
| group size | {group_size} |
| scales | {scale_dtype} |
| calibration | {calibration} |

Mean relative squared error of the layers' outputs on the calibration text:

| width | error |
|---|---|
{errors}

Serve it: `vllm serve DIR`, or `matgptq serve DIR` for a precision per request. Measure it:
`matgptq evaluate DIR --text FILE`. The error of every layer is in `calibration_log.json`.
"""


def model_card(config: Mapping[str, Any], spec: ParentSpec, options: CalibrateOptions, log: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        config: config.json of the original model.
        log: the calibration log, whose ``layers`` have an ``errors`` table each.
    """
    layers = log["layers"].values()
    means = {width: _mean([layer["errors"][str(width)] for layer in layers if layer["errors"]]) for width in WIDTHS}
    return CARD.format(
        name=options.model.absolute().name,
        widths=", ".join(str(width) for width in WIDTHS if width != 8),
        model_type=config.get("model_type", "unknown"),
        num_layers=config.get("num_hidden_layers", "?"),
        method=options.method,
        slice_rule=spec.slice_rule,
        group_size="one per output channel" if spec.group_size == -1 else spec.group_size,
        scale_dtype=spec.scale_dtype,
        calibration=(
            "none"
            if options.method == "rtn"
            else f"{options.num_samples} windows of {options.seq_len} tokens, seed {options.seed}"
        ),
        errors="\n".join(f"| {width} | {'not measured' if mean is None else f'{mean:.3g}'} |" for width, mean in means.items()),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
