"""Options of ``matgptq loadtest``, checked; and how each is written on the command line."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from loadtests.objectives import Objectives
from loadtests.server import MIX
from loadtests.workload import Lengths, Workload
from matgptq_vllm.core.errors import InputError

Value = TypeVar("Value")

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
"""Seconds per unit of a duration."""


@dataclass(frozen=True)
class Rate:
    """How often requests arrive."""

    value: float
    """Per second, inf for as fast as the bound on concurrency lets them; of a recorded trace, its speed; or a share."""
    of_capacity: bool = False
    """Whether ``value`` is a share of the requests per second that the server completes at rate inf."""

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.of_capacity else f"{self.value:g}"


@dataclass(frozen=True)
class Soak:
    """A long run whose server is watched, and what it must keep."""

    max_memory_growth: float = 0.02
    """Of resident memory, from the first tenth of the run to the last."""
    max_itl_drift: float = 0.10
    """Of the 99th percentile of inter-token latency, from the first third of the run to the last."""
    server_pid: int | None = None
    """Process whose memory counts, with its children; None: what /metrics says."""


@dataclass(frozen=True)
class LoadTestOptions:
    """One load test."""

    url: str
    out: Path
    precisions: tuple[str, ...]
    rates: tuple[Rate, ...]
    concurrency: tuple[int, ...]
    workload: Workload
    objectives: Objectives
    repeats: int = 1
    warmups: int = 4
    """Requests before every run that are not counted."""
    model: str | None = None
    tokenizer: str | None = None
    against: str | None = None
    """A second server, which gets the same load in turn."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of every request, such as budgets."""
    baseline: Path | None = None
    fail_if: float = 0.10
    """How much worse than the baseline a number may be."""
    soak: Soak | None = None

    def __post_init__(self) -> None:
        for name in ("precisions", "rates", "concurrency"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise InputError(f"--{name} names something twice; every run is there once, see --repeats")
        if any(bound < 1 for bound in self.concurrency):
            raise InputError(f"--concurrency {min(self.concurrency)} would send nothing; give numbers from 1")
        if self.repeats < 1:
            raise InputError(f"--repeats {self.repeats} would measure nothing; give a number from 1")
        if self.workload.cancel + self.workload.malformed > 1:
            raise InputError("--cancel and --malformed come to more than all requests; give shares of at most 100% together")
        if self.workload.trace not in ("poisson", "fixed", "bursts", "chat") and not Path(self.workload.trace).is_file():
            raise InputError(
                f"--trace {self.workload.trace} is neither poisson, fixed, bursts, chat nor a CSV file that exists; "
                "see docs/loadtest.md for the columns of one"
            )
        if self.soak is not None and (len(self.precisions), len(self.rates), len(self.concurrency), self.repeats) != (
            1,
            1,
            1,
            1,
        ):
            raise InputError(f"--soak is one run: give one precision (such as {MIX}), one rate, one concurrency, one repeat")
        if self.soak is not None and math.isinf(self.rates[0].value):
            raise InputError("--soak runs for a given time and so needs a finite rate, such as --rates 2 or --rates 80%")


def parse_list(option: str, text: str, parse: Callable[[str, str], Value]) -> tuple[Value, ...]:
    """Comma-separated values; InputError if there is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"{option} is empty; give values separated by commas")
    return tuple(parse(option, part) for part in parts)


def parse_rate(option: str, text: str) -> Rate:
    """``2``, ``0.5``, ``inf`` or ``80%``."""
    value = parse_share(option, text) if text.endswith("%") else _number(option, text, "a rate such as 2, inf or 80%")
    if not value > 0:
        raise InputError(f"{option} {text} sends nothing; give a rate above 0, such as 2, inf or 80%")
    return Rate(value, text.endswith("%"))


def parse_count(option: str, text: str) -> int:
    """A whole number from 0."""
    if not re.fullmatch(r"\d+", text):
        raise InputError(f"{option} {text!r} is not a whole number from 0")
    return int(text)


def parse_share(option: str, text: str) -> float:
    """``5%`` or ``0.05``."""
    number = _number(option, text.removesuffix("%"), "a share such as 5% or 0.05")
    share = number / 100 if text.endswith("%") else number
    if not 0 <= share < math.inf:
        raise InputError(f"{option} {text!r} is not a share; give one such as 5% or 0.05")
    return share


def parse_duration(option: str, text: str) -> float:
    """``90``, ``90s``, ``15m`` or ``2h``, in seconds."""
    match = re.fullmatch(r"([0-9.]+)([smh]?)", text)
    seconds = _number(option, match[1], "a time") * UNITS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise InputError(f"{option} {text!r} is not a time; give one such as 90s, 15m or 2h")
    return seconds


def parse_lengths(option: str, text: str) -> Lengths:
    """``64``, or ``32-128`` for lengths in between."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise InputError(f"{option} {text!r} is not a number of tokens; give one such as 64, or a range such as 32-128")
    return Lengths(low, high)


def parse_milliseconds(option: str, text: str) -> float:
    """A number above 0."""
    value = _number(option, text, "a number of milliseconds above 0")
    if not 0 < value < math.inf:
        raise InputError(f"{option} {text!r} is not a number of milliseconds above 0")
    return value


def parse_name(option: str, text: str) -> str:
    """Any text."""
    return text


def _number(option: str, text: str, allowed: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is not {allowed}") from None
    if math.isnan(number):
        raise InputError(f"{option} {text!r} is not {allowed}")
    return number
