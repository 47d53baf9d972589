"""Show what a parent holds, and check that it is what calibration wrote."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calibrate.expert_tokens import expert_lines, expert_tokens
from calibrate.export import LOG_FILE
from calibrate.options import InspectOptions
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.storage import plane_bytes, profile_bytes, scale_bytes

WORST = "*"
"""Marks the largest error of a width."""


def describe_parent(options: InspectOptions) -> dict[str, Any]:
    """Spec, layers, errors, bytes and profiles of a parent, as JSON values.

    ``errors`` maps layer to width to the squared error of the layer's outputs on the calibration text, relative to the
    outputs, as the calibration log has it; it is empty if there is no log or nothing was measured. ``experts`` maps the
    layers of experts to the calibration tokens that they saw, and to those wanted. ``verified_tensors`` is the number of
    tensors whose digests were compared; None without ``verify``.

    Raises:
        FormatError: not a whole parent, or a log that is not one; with ``verify`` also any tensor that is not what
            calibration wrote.
    """
    reader = ParentReader(options.model)
    profiles = reader.profiles()
    num_weights = reader.num_weights
    errors, experts = _logged(reader)
    return {
        "model": str(options.model),
        "parent": reader.spec.to_dict(),
        "layers": {name: list(shape) for name, shape in reader.layers.items()},
        "errors": errors,
        "experts": experts,
        "bytes": {
            "planes": plane_bytes(reader),
            "scales": scale_bytes(reader),
            "files": {file: (reader.directory / file).stat().st_size for file in reader.files()},
        },
        "profiles": {
            profile.name: {
                "bits_per_weight": profile.average_bits(num_weights),
                "weight_bytes": profile_bytes(reader, profile),
            }
            for profile in profiles
        },
        "verified_tensors": sum(1 for _ in reader.tensors()) if options.verify else None,
    }


def _logged(reader: ParentReader) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Errors and experts' tokens by layer, from the calibration log; layers without a measurement are left out."""
    try:
        text = (reader.directory / LOG_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, {}
    try:
        logged = dict(json.loads(text)["layers"])
        errors = {name: dict(logged[name].get("errors") or {}) for name in reader.layers if name in logged}
        measured = {
            name: {width: float(error) for width, error in of_layer.items()} for name, of_layer in errors.items() if of_layer
        }
        return measured, expert_tokens(logged)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{LOG_FILE}: not a calibration log ({type(error).__name__}: {error}); copy it again") from error


def as_text(description: dict[str, Any]) -> str:
    """The description for a terminal."""
    parent, sizes = description["parent"], description["bytes"]
    lines = [
        f"{description['model']}: parent, slice rule {parent['slice_rule']}, group size {parent['group_size']}, "
        f"planes {parent['plane_widths']} bits, scales {parent['scale_dtype']}",
        "",
        *_layer_lines(description["layers"], description["errors"]),
        *expert_lines(description["experts"]),
        "",
        "bytes of the quantized layers",
    ]
    lines += [f"  plane {index}  {size:>14,}" for index, size in enumerate(sizes["planes"])]
    lines += [f"  scales   {sizes['scales']:>14,}", "", "files"]
    lines += [f"  {name}  {size:,}" for name, size in sizes["files"].items()]
    lines += ["", "profiles (bits per weight, bytes read)"]
    lines += [
        f"  {name}  {profile['bits_per_weight']:.2f}  {profile['weight_bytes']:,}"
        for name, profile in description["profiles"].items()
    ]
    if description["verified_tensors"] is not None:
        lines += ["", f"all {description['verified_tensors']} tensors are what calibration wrote"]
    return "\n".join(lines)


def _layer_lines(layers: Mapping[str, Sequence[int]], errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line per layer: the worst first, by its error at the narrowest width; in checkpoint order without errors."""
    widths = [str(width) for width in WIDTHS if any(str(width) in of_layer for of_layer in errors.values())]
    if not widths:
        shown = [f"  {name}  {n} x {k}" for name, (n, k) in layers.items()]
        return [f"{len(layers)} quantized layers (outputs x inputs); no errors were measured", *shown]
    worst = {width: max(of_layer.get(width, -1.0) for of_layer in errors.values()) for width in widths}
    rows = [["layer", "outputs x inputs", *(f"{width} bits" for width in widths)]]
    order = sorted(layers, key=lambda name: -errors.get(name, {}).get(widths[0], -1.0))
    for name in order:
        of_layer = errors.get(name, {})
        cells = [
            f"{of_layer[width]:.3g}{WORST if of_layer[width] == worst[width] else ' '}" if width in of_layer else "-"
            for width in widths
        ]
        rows.append([name, f"{layers[name][0]} x {layers[name][1]}", *cells])
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = f"{len(layers)} quantized layers, relative squared error of their outputs on the calibration text"
    return [
        f"{title}; worst first, {WORST} is the worst of a width",
        *("  " + "  ".join([row[0].ljust(columns[0]), *map(str.rjust, row[1:], columns[1:])]).rstrip() for row in rows),
    ]
