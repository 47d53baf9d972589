"""The options of import and export. Imports no torch: the command line is built from this file."""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

from dataclasses import dataclass
from pathlib import Path

from calibrate.option_fields import DEVICES, check_at_least, check_choices, option
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS, check_profile_name

FORMATS = ("compressed-tensors", "gptq")

STORED_BITS = (4, 8)
"""Bits per weight that vLLM's kernels for both formats read, on GPUs of every supported generation."""

FITS = ("parent", "slice")


def parse_paths(text: str) -> tuple[Path, ...]:
    """``"a.txt,b.txt"`` -> two paths; InputError if an item is empty."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise InputError(f"{text!r} has an empty item; write FILE or FILE,FILE")
    return tuple(map(Path, items))


@dataclass(frozen=True)
class ImportOptions:
    """Turn a checkpoint of the published MatGPTQ plugin (quant_method matgptq_quant) into a parent."""

    model: Path = option("folder of the published checkpoint", parse=Path)
    out: Path = option("folder to create: the parent", parse=Path)
    profiles: tuple[Path, ...] | None = option(
        "files of the published search, a line 'layer: width' per layer; each becomes a profile called as the file",
        None,
        parse=parse_paths,
        metavar="FILE,...",
    )
    overwrite: bool = option("replace an existing parent, once the new one is whole", False)
    dry_run: bool = option("check everything but the values and print the plan; write nothing", False)
    json: bool = option("print JSON instead of text", False)


@dataclass(frozen=True)
class ExportOptions:
    """Turn a parent at one width or profile into a W4A16 or W8A16 checkpoint that vLLM loads without this project."""

    model: Path = option("folder of the parent", parse=Path)
    out: Path = option("folder to create: the checkpoint", parse=Path)
    width: int | None = option("width of the slice to export", None, parse=int, choices=WIDTHS)
    profile: str | None = option("profile to export, instead of a width", None, metavar="NAME")
    format: str = option("format of the checkpoint", "compressed-tensors", choices=FORMATS)
    bits: int | None = option(
        "bits that the checkpoint stores per weight; unset, 4 where no layer's width is above 4, else 8",
        None,
        parse=int,
        choices=STORED_BITS,
    )
    fit: str = option(
        "what a layer holds whose slice these bits cannot hold: parent is the rounding nearest to the parent's 8-bit "
        "values, slice the one nearest to the slice's own",
        "parent",
        choices=FITS,
    )
    text: Path | None = option("UTF-8 text to measure the perplexity of slice and checkpoint on", None, parse=Path)
    seq_len: int = option("tokens per window of --text", 512, parse=int)
    limit_windows: int | None = option("measure the first N windows of --text only", None, parse=int, metavar="N")
    overwrite: bool = option("replace an existing export, once the new one is whole", False)
    device: str = option("where to compute", "auto", choices=DEVICES)
    dry_run: bool = option("check everything and print the plan; write nothing", False)
    json: bool = option("print JSON instead of text", False)

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least("seq_len", self.seq_len, 2)
        if self.limit_windows is not None:
            check_at_least("limit_windows", self.limit_windows, 1)
        if (self.width is None) == (self.profile is None):
            raise InputError("give either --width or --profile: what is exported is one slice of the parent")
        if self.profile is not None:
            check_profile_name(self.profile)

    @property
    def precision(self) -> str:
        """Name of the profile to export."""
        return str(self.width) if self.profile is None else self.profile
