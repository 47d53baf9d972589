"""The options of calibrate and inspect, checked when made. The help of a field is the CLI's help.

Imports no torch: the command line is built from this file.
"""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrate.option_fields import DEVICES, check_at_least, check_choices, listed, option
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import GROUP_SIZES, SLICE_RULE_NAMES
from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS, check_width

METHODS = ("gptq", "rtn")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


def parse_width_weights(text: str) -> Mapping[int, float]:
    """``"3,4:2,8:0.5"`` -> {3: 1.0, 4: 2.0, 8: 0.5}; InputError unless every item is WIDTH or WIDTH:WEIGHT."""
    weights: dict[int, float] = {}
    for item in text.split(","):
        width, _, weight = item.strip().partition(":")
        try:
            parsed = int(width), float(weight) if weight else 1.0
        except ValueError:
            raise InputError(f"{item!r} in {text!r} is not WIDTH or WIDTH:WEIGHT; write for example 3,4:2,8:0.5") from None
        if parsed[0] in weights:
            raise InputError(f"width {parsed[0]} appears twice in {text!r}; name each width once")
        weights[parsed[0]] = parsed[1]
    return check_width_weights("widths", weights)


def check_width_weights(name: str, weights: Mapping[int, float]) -> Mapping[int, float]:
    """A copy of ``weights`` (width -> weight); InputError unless widths exist and weights are finite and above 0."""
    if not weights:
        raise InputError(f"{name} is empty; name at least one of the widths {listed(WIDTHS)}")
    for width, weight in weights.items():
        check_width(width)
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(
                f"{name}: weight {weight!r} of width {width} is not a finite number above 0; leave the width out instead"
            )
    return dict(weights)


def parse_streams(text: str) -> tuple[int, ...]:
    """``"2,3,4"`` -> (2, 3, 4), ``"none"`` -> (); InputError as ``check_streams``."""
    if text.strip() in ("", "none"):
        return ()
    try:
        return check_streams(tuple(int(item) for item in text.split(",")))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"streams {text!r} is not a list of widths; write for example 2,3,4, or none") from None


def check_streams(streams: Sequence[int]) -> tuple[int, ...]:
    """``streams`` in ascending order; InputError unless they are widths, each there once."""
    for width in streams:
        check_width(width)
    if len(set(streams)) < len(streams):
        raise InputError(f"streams {listed(streams)} name a width twice; name each once")
    return tuple(sorted(streams))


@dataclass(frozen=True)
class CalibrateOptions:
    """Turn a Hugging Face model into a parent."""

    model: Path = option("folder of the model, in Hugging Face format", parse=Path)
    out: Path = option("folder to create: the parent", parse=Path)
    text: Path | None = option("UTF-8 text to calibrate on; not needed by --method rtn", None, parse=Path)
    num_samples: int = option("windows of calibration text", 256, parse=int)
    seq_len: int = option("tokens per window", 512, parse=int)
    group_size: int = option(
        "adjacent inputs that share a scale; -1 is one scale per output channel", 128, parse=int, choices=GROUP_SIZES
    )
    slice_rule: str = option("how a sliced code gets its value", "curved", choices=SLICE_RULE_NAMES)
    widths: Mapping[int, float] = option(
        "widths that codes and scales are chosen for, each with the weight of its squared error, such as 3,4:2,8",
        {2: 1.0, 3: 2.0, 4: 5.5, 6: 20.0, 8: 60.0},
        parse=parse_width_weights,
        metavar="R[:W],...",
    )
    streams: tuple[int, ...] = option(
        "narrow widths whose own activations are followed through the model, or none; other widths see the original's",
        (2, 3, 4),
        parse=parse_streams,
        metavar="R,...",
    )
    damp: float = option("share of the mean Hessian diagonal added to the diagonal", 0.03, parse=float)
    asymmetry: float = option(
        "how far a stream's layers also make up for the errors of its inputs: 0 not at all, 1 wholly", 0.5, parse=float
    )
    sweeps: int = option("rounds of coordinate descent over the codes of a layer", 4, parse=int)
    seed: int = option("seed of the choice of windows", 0, parse=int)
    method: str = option("gptq, or rtn: round to nearest, the baseline of comparisons", "gptq", choices=METHODS)
    overwrite: bool = option("replace an existing parent, once the new one is whole", False)
    restart: bool = option("discard an unfinished run to the same --out instead of taking it up", False)
    compute_dtype: str = option(
        "type in which blocks compute; auto is float32 on the CPU and for small models, otherwise bfloat16",
        "auto",
        choices=COMPUTE_DTYPES,
    )
    device: str = option("where to compute", "auto", choices=DEVICES)
    dry_run: bool = option("check everything and print the plan; write nothing", False)

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least("num_samples", self.num_samples, 1)
        check_at_least("seq_len", self.seq_len, 2)
        check_at_least("seed", self.seed, 0)
        object.__setattr__(self, "widths", check_width_weights("widths", self.widths))
        object.__setattr__(self, "streams", check_streams(self.streams))
        check_at_least("sweeps", self.sweeps, 0)
        if not 0 <= self.asymmetry <= 1:
            raise InputError(f"asymmetry is {self.asymmetry!r}; it must be from 0 to 1")
        if not (math.isfinite(self.damp) and 0 < self.damp <= 1):
            raise InputError(f"damp is {self.damp!r}; it must be above 0 and at most 1, 0.03 is usual")
        if self.method == "gptq" and self.text is None:
            raise InputError("calibration needs --text FILE; only --method rtn works without text")


@dataclass(frozen=True)
class InspectOptions:
    """Show what a parent holds."""

    model: Path = option("folder of the parent", parse=Path)
    verify: bool = option("read every tensor and compare it with its digest", False)
    json: bool = option("print JSON instead of a table", False)


@dataclass(frozen=True)
class FetchOptions:
    """Copy or download the part of a parent that a replica of some width reads."""

    model: Path = option("folder of the parent, or its repository on the Hugging Face hub: ORGANIZATION/NAME", parse=Path)
    out: Path = option("folder to create: a parent of that width", parse=Path)
    max_width: int = option("widest width that shall be served from it", PARENT_WIDTH, parse=int, choices=WIDTHS)
    revision: str | None = option("branch, tag or commit of the repository", None)

    def __post_init__(self) -> None:
        check_choices(self)
