"""ParentSpec: what a reader must know of a parent before its tensors; the ``quantization_config`` of its config.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from matgptq_vllm.core.errors import FormatError, InputError

QUANT_METHOD = "matgptq"
"""Name under which vLLM and Hugging Face tools know the format."""

FORMAT_VERSION = 2
"""Version of the layout on disk; a reader refuses any other."""

GROUP_SIZES = (32, 64, 128, -1)
"""Inputs that share a scale; -1 is one scale per output channel."""

SCALES = "scales"
"""Name of the tensor of scales within a layer."""

SCALE_DTYPES = ("bfloat16", "float16", "float32")
SLICE_RULE_NAMES = ("nested", "curved", "round")


@dataclass(frozen=True)
class ParentSpec:
    """The constants of a parent. Its arithmetic is in ``core.slicing``, its bits in ``core.planes``."""

    slice_rule: str = "nested"
    """Rule that gives a sliced code its value: nested, curved or round."""

    group_size: int = 128
    """Adjacent inputs that share a scale: 32, 64, 128, or -1 for one scale per output channel."""

    plane_widths: tuple[int, ...] = (2, 1, 1, 2, 2)
    """Bits per plane, most significant plane first."""

    scale_dtype: str = "bfloat16"
    """Type of the stored scales: bfloat16, float16 or float32."""

    symmetric: bool = True
    """Whether weight 0 sits in the middle of the codes; the only layout of this version."""

    def __post_init__(self) -> None:
        _check("slice_rule", self.slice_rule, SLICE_RULE_NAMES)
        _check("group_size", self.group_size, GROUP_SIZES)
        _check("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _check("symmetric", self.symmetric, (True,))

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of this parent."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "plane_widths": list(self.plane_widths),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "quantization_config") -> "ParentSpec":
        """The spec written by ``to_dict``.

        Args:
            source: where ``config`` was read, for messages.

        Raises:
            FormatError: another method or version, or a field that is missing, unknown or out of range.
        """
        if config.get("quant_method") != QUANT_METHOD:
            raise FormatError(f"{source}: quant_method is {config.get('quant_method')!r}, a parent has {QUANT_METHOD!r}")
        if config.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{source}: format_version is {config.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
                "calibrate the model again, or use the release that wrote it"
            )
        names = {field.name for field in fields(cls)}
        given = {key: value for key, value in config.items() if key not in ("quant_method", "format_version")}
        if given.keys() != names:
            raise FormatError(
                f"{source}: fields {sorted(given.keys() ^ names)} are missing or unknown; a parent has exactly {sorted(names)}"
            )
        try:
            return cls(**{**given, "plane_widths": tuple(given["plane_widths"])})
        except (InputError, TypeError) as error:
            raise FormatError(f"{source}: {error}") from error


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    # By type too: JSON's 128.0 and true equal 128 and 1, and would fail only where they are used.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise InputError(f"{name} {value!r} is not supported; use one of {', '.join(map(str, allowed))}")
