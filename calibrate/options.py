"""The options of every verb: one frozen dataclass each, checked when made. The help of a field is the CLI's help.

Imports no torch: the command line is built from this file.
"""

# option() returns a dataclass field, which is not shared between instances.
# ruff: noqa: RUF009

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import GROUP_SIZES, SLICE_RULE_NAMES
from matgptq_vllm.core.precision import WIDTHS, check_profile_name, check_width

METHODS = ("gptq", "rtn")
DEVICES = ("auto", "cpu", "cuda")

Verb = TypeVar("Verb", bound="CalibrateOptions | EvaluateOptions | InspectOptions")


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
        raise InputError(f"{name} is empty; name at least one of the widths {_listed(WIDTHS)}")
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


def option(
    help: str, default: Any = MISSING, *, parse: Callable[[str], Any] = str, choices: tuple = (), metavar: str | None = None
) -> Any:
    """A dataclass field that is a command-line option; one without a default is positional or required.

    Args:
        parse: from the command line's text to the value.
        choices: the values allowed, if they can be listed.
    """
    metadata = {"help": help, "parse": parse, "choices": choices, "metavar": metavar}
    if isinstance(default, Mapping | tuple):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
        _check_choices(self)
        _check_at_least("num_samples", self.num_samples, 1)
        _check_at_least("seq_len", self.seq_len, 2)
        _check_at_least("seed", self.seed, 0)
        object.__setattr__(self, "widths", check_width_weights("widths", self.widths))
        object.__setattr__(self, "compensate", check_stages(self.compensate))
        if not (math.isfinite(self.damp) and 0 < self.damp <= 1):
            raise InputError(f"damp is {self.damp!r}; it must be above 0 and at most 1, 0.01 is usual")
        if self.method == "gptq" and self.text is None:
            raise InputError("calibration needs --text FILE; only --method rtn works without text")


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
        _check_choices(self)
        _check_at_least("seq_len", self.seq_len, 2)
        if self.limit_windows is not None:
            _check_at_least("limit_windows", self.limit_windows, 1)
        if self.width is not None and self.profile is not None:
            raise InputError(f"--width {self.width} and --profile {self.profile} exclude each other; give one")
        if self.profile is not None:
            check_profile_name(self.profile)

    @property
    def precision(self) -> str | None:
        """Name of the one profile to measure; None for all."""
        return self.profile if self.width is None else str(self.width)


@dataclass(frozen=True)
class InspectOptions:
    """Show what a parent holds."""

    model: Path = option("folder of the parent", parse=Path)
    verify: bool = option("read every tensor and compare it with its digest", False)
    json: bool = option("print JSON instead of a table", False)


def add_arguments(parser: argparse.ArgumentParser, verb: type, positional: tuple[str, ...]) -> None:
    """Give ``parser`` an argument for every field of ``verb``; the fields named in ``positional`` come without dashes."""
    for spec in fields(verb):
        help, metavar = spec.metadata["help"], spec.metadata["metavar"]
        choices, flag = spec.metadata["choices"], "--" + spec.name.replace("_", "-")
        if spec.name in positional:
            parser.add_argument(spec.name, type=Path, metavar=spec.name.upper(), help=help)
        elif spec.type is bool:
            parser.add_argument(flag, action="store_true", help=help)
        else:
            # Plain text here: the dataclass parses and checks, so that its message reaches the user whole.
            shown = metavar or ("|".join(map(str, choices)) if choices else spec.name.upper())
            default = spec.default if spec.default_factory is MISSING else spec.default_factory()
            required = default is MISSING
            note = "" if required or default is None else f" (default: {_shown(default)})"
            parser.add_argument(flag, required=required, metavar=shown, help=(help + note).replace("%", "%%"), default=None)


def from_namespace(verb: type[Verb], namespace: argparse.Namespace) -> Verb:
    """The options of ``verb`` in parsed arguments; InputError names the option and value that is wrong."""
    values = {}
    for spec in fields(verb):
        value = getattr(namespace, spec.name)
        if value is None:
            continue
        if isinstance(value, str):
            try:
                value = spec.metadata["parse"](value)
            except InputError:
                raise
            except ValueError:
                raise InputError(
                    f"--{spec.name.replace('_', '-')} {value!r} is not a number{_allowed(spec.metadata['choices'])}"
                ) from None
        values[spec.name] = value
    return verb(**values)


def _check_choices(options: Any) -> None:
    for spec in fields(options):
        choices, value = spec.metadata["choices"], getattr(options, spec.name)
        if choices and value is not None and value not in choices:
            raise InputError(f"{spec.name} {value!r} is not supported; use one of {_listed(choices)}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} is {value}; it must be {least} or more")


def _allowed(choices: tuple) -> str:
    return f"; use one of {_listed(choices)}" if choices else ""


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return "/".join(map(_shown, default))
    if not isinstance(default, Mapping):
        return str(default)
    return ",".join(f"{width}" if weight == 1 else f"{width}:{weight:g}" for width, weight in default.items())
