"""The model card of a parent: what it is, how it was made, how to serve it, and its quality once measured."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from calibrate.options import CalibrateOptions
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import bits_read, check_rule, num_groups

CARD_FILE = "README.md"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")

QUALITY_BEGINS = "<!-- matgptq quality: begins -->"
QUALITY_ENDS = "<!-- matgptq quality: ends -->"
"""What is between these lines is replaced by every ``matgptq evaluate --update-card``."""

CARD = """\
---
library_name: vllm
pipeline_tag: text-generation
base_model: {base_model}
base_model_relation: quantized
{licence}tags:
- matgptq
- quantized
---
# {name}, a MatGPTQ parent

One checkpoint of 8-bit codes. A reader takes the top {widths} or 8 bits of every weight; each width is a model of its own.
Quantized from `{base_model}`, a `{model_type}` model: {num_layers} linear layers of its {num_blocks} blocks,
{num_weights:.1f} M weights.

## Serve it

```bash
pip install matgptq-vllm
matgptq serve DIR                     # every request picks its precision
curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -H 'X-Precision: 4' \\
  -d '{{"model": "DIR", "prompt": "Once upon a time", "max_tokens": 32}}'
```

`vllm serve DIR` works too, at the default precision.

## Widths and profiles

| profile | bits per weight | MiB read | mean error of the layers |
|---|---|---|---|
{width_rows}

MiB are those of the quantized layers, scales included. The error is the squared error of a layer's outputs on the calibration
text, relative to the outputs; that of every layer is in `calibration_log.json`. Profiles that mix widths are added by
`matgptq search`; `matgptq inspect DIR` lists all.

## Quality

{begins}
Not measured yet: `matgptq evaluate DIR --text FILE --update-card` puts perplexity and distance to the original here.
{ends}

## Calibration

| | |
|---|---|
| method | {method} |
| calibration text | {calibration} |
| slice rule | {slice_rule} |
| group size | {group_size} |
| scales | {scale_dtype} |
{settings}
"""


def model_card(config: Mapping[str, Any], spec: ParentSpec, options: CalibrateOptions, log: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        config: config.json of the original model.
        log: the calibration log, whose ``layers`` have a ``shape`` and an ``errors`` table each.
    """
    layers = log["layers"].values()
    shapes = [tuple(layer["shape"]) for layer in layers]
    return CARD.format(
        name=options.model.absolute().name,
        base_model=base_model(options.model),
        licence=licence_metadata(options.model),
        widths=", ".join(str(width) for width in WIDTHS if width != 8),
        model_type=config.get("model_type", "unknown"),
        num_layers=len(shapes),
        num_blocks=config.get("num_hidden_layers", "?"),
        num_weights=sum(n * k for n, k in shapes) / 1e6,
        width_rows="\n".join(
            f"| {width} | {width} | {width_bytes(shapes, width, spec) / 2**20:.1f} | {_mean_error(layers, width)} |"
            for width in WIDTHS
        ),
        begins=QUALITY_BEGINS,
        ends=QUALITY_ENDS,
        method=options.method,
        slice_rule=spec.slice_rule,
        group_size="one per output channel" if spec.group_size == -1 else spec.group_size,
        scale_dtype=spec.scale_dtype,
        calibration=(
            "none"
            if options.method == "rtn"
            else f"`{options.text.name if options.text else ''}`: {options.num_samples} windows of {options.seq_len} tokens, "
            f"seed {options.seed}"
        ),
        settings="" if options.method == "rtn" else _settings(log["options"]),
    )


def base_model(directory: Path) -> str:
    """Name of the model in ``directory``: ``org/name`` in a Hugging Face cache, the folder's name elsewhere."""
    for part in directory.absolute().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return directory.absolute().name


def licence_metadata(directory: Path) -> str:
    """Lines of a card's metadata about the licence of the model in ``directory``: its card's own, or its licence file."""
    try:
        card = (directory / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        card = ""
    front = re.match(r"---\n(.*?)\n---\s", card, re.DOTALL)
    lines = re.findall(r"^license(?:_name|_link)?:[ \t]*\S.*$", front[1], re.MULTILINE) if front else []
    if not lines:
        files = [name for name in LICENCE_FILES if (directory / name).is_file()]
        lines = ["license: other", f"license_link: {files[0]}"] if files else []
    return "".join(f"{line}\n" for line in lines)


def width_bytes(shapes: Iterable[tuple[int, int]], width: int, spec: ParentSpec) -> int:
    """Bytes of codes and scales that layers of ``shapes`` (N, K) are read from at ``width``."""
    layout = PlaneLayout(spec.plane_widths)
    planes = range(layout.num_planes(bits_read(width, check_rule(spec.slice_rule))))
    scale = getattr(torch, spec.scale_dtype).itemsize
    return sum(
        n * (sum(layout.packed_columns(plane, k) for plane in planes) + num_groups(k, spec.group_size) * scale)
        for n, k in shapes
    )


def write_quality(directory: Path, section: str) -> None:
    """Put ``section``, Markdown, between the card's quality marks, or at its end where it has none.

    Raises:
        InputError: the parent in ``directory`` has no card.
    """
    path = directory / CARD_FILE
    try:
        card = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{directory} has no {CARD_FILE} to update; leave --update-card out") from None
    marked = f"{QUALITY_BEGINS}\n{section.strip()}\n{QUALITY_ENDS}"
    before, begins, rest = card.partition(QUALITY_BEGINS)
    _, ends, after = rest.partition(QUALITY_ENDS)
    text = before + marked + after if begins and ends else f"{card.rstrip()}\n\n## Quality\n\n{marked}\n"
    path.write_text(text, encoding="utf-8")


def _mean_error(layers: Iterable[Mapping[str, Any]], width: int) -> str:
    errors = [layer["errors"][str(width)] for layer in layers if layer.get("errors")]
    return f"{sum(errors) / len(errors):.3g}" if errors else "not measured"


def _settings(options: Mapping[str, Any]) -> str:
    """The other options of the run, one row each, as the log has them."""
    shown = {"model", "text", "num_samples", "seq_len", "seed", "method", "slice_rule", "group_size", "device"}
    return "\n".join(f"| `{name}` | `{value}` |" for name, value in options.items() if name not in shown)
