"""The benchmark's command line as a frozen dataclass."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS, check_width
from matgptq_vllm.core.slicing import SliceRule, check_rule
from matgptq_vllm.kernels.bench.competitors import Competitor, choose
from matgptq_vllm.kernels.bench.shapes import MODELS
from matgptq_vllm.kernels.bench.timing import MIN_ROUNDS

RULES: tuple[SliceRule, ...] = ("curved", "nested")
GROUP_SIZES = (-1, 32, 64, 128)
DEFAULT_OUT = "kernel-bench"

Value = TypeVar("Value")


@dataclass(frozen=True)
class BenchOptions:
    """What to time."""

    models: tuple[str, ...]
    ms: tuple[int, ...]
    competitors: tuple[Competitor, ...]
    rule: SliceRule
    group_size: int
    rounds: int
    seconds: float
    """Per model."""
    out: Path
    json: bool
    plot: bool


def parse_options(arguments: Sequence[str] | None) -> BenchOptions:
    """Options from the command line (``sys.argv`` if None); InputError names what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m matgptq_vllm.kernels.bench",
        description="Time the sliced matrix products of a model's layers on this GPU: microseconds per call, from CUDA graphs "
        "over more weights than the L2 cache holds, all competitors taking turns in one process.",
    )
    parser.add_argument("--model", default="llama-3.1-8b", help=f"some of {', '.join(MODELS)}; default %(default)s")
    parser.add_argument("--m", default="1,4,16,32,64,128,256,512,2048", help="rows of a batch; default %(default)s")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="widths to time; default %(default)s")
    parser.add_argument("--peers", action="store_true", help="time cuBLAS in bfloat16, and vLLM's Marlin and Machete, too")
    parser.add_argument("--alone", action="store_true", help="time every width also in a replica that holds no other")
    parser.add_argument("--only", default="", metavar="NAME,...", help="just these competitors: width-4, mixed-4-8, bf16, ...")
    parser.add_argument("--rule", default=RULES[0], help=f"slice rule, {' or '.join(RULES)}; default %(default)s")
    parser.add_argument("--group-size", default="128", help="weights per scale, -1 for one per channel; default %(default)s")
    parser.add_argument("--rounds", default="15", help="timed replays of every competitor; default %(default)s")
    parser.add_argument("--seconds", default="100", help="time allowed per model; rounds are left out to keep to it")
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help="folder for the results; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing (matplotlib is then not needed)")
    given = parser.parse_args(arguments)
    models = _several("--model", given.model, str, lambda name: name in MODELS, f"some of {', '.join(MODELS)}")
    widths = tuple(check_width(width) for width in _several("--widths", given.widths, int, lambda _: True, "whole numbers"))
    only = _several("--only", given.only, str, bool, "names of competitors") if given.only else ()
    competitors = choose(given.peers, widths, given.alone, only)
    rule = _one("--rule", given.rule, str, lambda name: name in RULES, " or ".join(RULES))
    return BenchOptions(
        models=models,
        ms=tuple(sorted(set(_several("--m", given.m, int, lambda m: m >= 1, "whole numbers, 1 or more")))),
        competitors=competitors,
        rule=check_rule(rule),
        group_size=_one("--group-size", given.group_size, int, lambda g: g in GROUP_SIZES, f"one of {GROUP_SIZES}"),
        rounds=_one("--rounds", given.rounds, int, lambda n: n >= MIN_ROUNDS, f"a whole number, {MIN_ROUNDS} or more"),
        seconds=_one("--seconds", given.seconds, float, lambda s: 0 < s < float("inf"), "a positive number"),
        out=Path(given.out),
        json=given.json,
        plot=not given.no_plot,
    )


def _several(
    option: str, text: str, parse: Callable[[str], Value], is_allowed: Callable[[Value], bool], allowed: str
) -> tuple[Value, ...]:
    """Values of a comma-separated option, each once."""
    parts = [part.strip() for part in text.split(",")]
    return tuple(dict.fromkeys(_one(option, part, parse, is_allowed, allowed) for part in parts))


def _one(option: str, text: str, parse: Callable[[str], Value], is_allowed: Callable[[Value], bool], allowed: str) -> Value:
    try:
        value = parse(text)
    except ValueError:
        value = None
    if value is None or not is_allowed(value):
        raise InputError(f"{option} {text!r} is not supported; use {allowed}")
    return value
