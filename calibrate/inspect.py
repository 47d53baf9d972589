"""Show what a parent holds, and check that it is what calibration wrote."""

from typing import Any

from calibrate.options import InspectOptions
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.storage import plane_bytes, profile_bytes, scale_bytes


def describe_parent(options: InspectOptions) -> dict[str, Any]:
    """Spec, layers, bytes and profiles of a parent, as JSON values.

    ``verified_tensors`` is the number of tensors whose digests were compared; None without ``verify``.

    Raises:
        FormatError: not a whole parent; with ``verify`` also any tensor that is not what calibration wrote.
    """
    reader = ParentReader(options.model)
    profiles = reader.profiles()
    num_weights = reader.num_weights
    return {
        "model": str(options.model),
        "parent": reader.spec.to_dict(),
        "layers": {name: list(shape) for name, shape in reader.layers.items()},
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


def as_text(description: dict[str, Any]) -> str:
    """The description for a terminal."""
    parent, sizes = description["parent"], description["bytes"]
    lines = [
        f"{description['model']}: parent, slice rule {parent['slice_rule']}, group size {parent['group_size']}, "
        f"planes {parent['plane_widths']} bits, scales {parent['scale_dtype']}",
        "",
        f"{len(description['layers'])} quantized layers (outputs x inputs)",
    ]
    lines += [f"  {name}  {n} x {k}" for name, (n, k) in description["layers"].items()]
    lines += ["", "bytes of the quantized layers"]
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
