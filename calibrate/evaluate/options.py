"""The options of evaluate. Imports no torch: the command line is built from this file."""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

from dataclasses import dataclass
from pathlib import Path

from calibrate.option_fields import DEVICES, check_at_least, check_choices, option
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS, check_profile_name


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure perplexity of a parent at one profile or at all, or of a plain model."""

    model: Path = option("folder of a parent, or of a plain Hugging Face model", parse=Path)
    text: Path = option("UTF-8 text to measure on; it must not be text that was calibrated on", parse=Path)
    width: int | None = option("measure this width only", None, parse=int, choices=WIDTHS)
    profile: str | None = option("measure this profile only", None, metavar="NAME")
    seq_len: int = option("tokens per window; the first of each is not scored", 512, parse=int)
    limit_windows: int | None = option("measure the first N windows only", None, parse=int, metavar="N")
    device: str = option("where to compute", "auto", choices=DEVICES)
    json: bool = option("print JSON instead of a table", False)

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least("seq_len", self.seq_len, 2)
        if self.limit_windows is not None:
            check_at_least("limit_windows", self.limit_windows, 1)
        if self.width is not None and self.profile is not None:
            raise InputError(f"--width {self.width} and --profile {self.profile} exclude each other; give one")
        if self.profile is not None:
            check_profile_name(self.profile)

    @property
    def precision(self) -> str | None:
        """Name of the one profile to measure; None for all."""
        return self.profile if self.width is None else str(self.width)
