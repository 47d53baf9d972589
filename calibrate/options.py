"""The options of calibrate and inspect, checked when made. The help of a field is the CLI's help.

Imports no torch: the command line is built from this file.
"""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from calibrate.option_fields import DEVICES, check_at_least, check_choices, listed, option
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import GROUP_SIZES, SLICE_RULE_NAMES
from matgptq_vllm.core.precision import WIDTHS, check_width

METHODS = ("gptq", "rtn")


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


def parse_stages(text: str) -> tuple[Mapping[int, float], ...]:
    """``"3,4/8"`` -> ({3: 1.0, 4: 1.0}, {8: 1.0}); InputError as ``parse_width_weights`` and ``check_stages``."""
    return check_stages(tuple(parse_width_weights(stage) for stage in text.split("/")))


def check_stages(stages: Sequence[Mapping[int, float]]) -> tuple[Mapping[int, float], ...]:
    """``stages``; InputError unless there is one, and each later one begins at a wider width."""
    checked = tuple(check_width_weights("compensate", stage) for stage in stages)
    if not checked:
        raise InputError("compensate is empty; name at least one width, such as 3,4/6,8")
    for stage, following in pairwise(checked):
        if min(stage) >= min(following):
            raise InputError(
                f"compensate: a stage from width {min(following)} comes after one from width {min(stage)}; "
                "each must begin at a wider width, as in 3,4/6,8"
            )
    return checked


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
    slice_rule: str = option("how a sliced code gets its value", "nested", choices=SLICE_RULE_NAMES)
    widths: Mapping[int, float] = option(
        "widths that codes and scales are chosen for, each with an optional weight of its squared error, such as 3,4:2,8",
        {2: 1.0, 3: 2.5, 4: 6.0, 6: 40.0, 8: 250.0},
        parse=parse_width_weights,
        metavar="R[:W],...",
    )
    compensate: tuple[Mapping[int, float], ...] = option(
        "widths whose mean error later columns make up for, each with an optional weight; a / begins another pass, "
        "from wider widths on, over the bits that the passes before have not decided",
        ({2: 1.0, 3: 2.0, 8: 12.0}, {3: 1.0, 8: 4.0}, {4: 1.0, 8: 2.0}, {6: 1.0}, {8: 1.0}),
        parse=parse_stages,
        metavar="R[:W],.../...",
    )
    propagate: int = option("width at which a finished block computes the inputs of the next", 8, parse=int, choices=WIDTHS)
    damp: float = option("share of the mean Hessian diagonal added to the diagonal", 0.01, parse=float)
    act_order: bool = option("round the columns with the largest activations first", False)
    seed: int = option("seed of the choice of windows", 0, parse=int)
    method: str = option("gptq, or rtn: round to nearest, the baseline of comparisons", "gptq", choices=METHODS)
    overwrite: bool = option("replace an existing parent, once the new one is whole", False)
    device: str = option("where to compute", "auto", choices=DEVICES)
    dry_run: bool = option("check everything and print the plan; write nothing", False)

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least("num_samples", self.num_samples, 1)
        check_at_least("seq_len", self.seq_len, 2)
        check_at_least("seed", self.seed, 0)
        object.__setattr__(self, "widths", check_width_weights("widths", self.widths))
        object.__setattr__(self, "compensate", check_stages(self.compensate))
        if not (math.isfinite(self.damp) and 0 < self.damp <= 1):
            raise InputError(f"damp is {self.damp!r}; it must be above 0 and at most 1, 0.01 is usual")
        if self.method == "gptq" and self.text is None:
            raise InputError("calibration needs --text FILE; only --method rtn works without text")


@dataclass(frozen=True)
class InspectOptions:
    """Show what a parent holds."""

    model: Path = option("folder of the parent", parse=Path)
    verify: bool = option("read every tensor and compare it with its digest", False)
    json: bool = option("print JSON instead of a table", False)
