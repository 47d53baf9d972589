"""The verb ``tune``. Importing this file imports no torch."""

import argparse
from pathlib import Path

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.summary import ParentSummary
from matgptq_vllm.kernels.bench.shapes import MODELS
from matgptq_vllm.kernels.tables import DIRECTORY_VARIABLE, WIDTHS_CLASSES
from matgptq_vllm.kernels.tune.options import DEFAULT_MS, DEFAULT_SECONDS, TuneOptions, parse_list, parse_shapes, shapes_of

DESCRIPTION = """\
Measure which kernel configurations this GPU runs fastest, and write them to a table that every later start reads.
Without a table for its GPU, a replica picks configurations by rule: right, but not the fastest."""


def add_verbs(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb; its ``run(namespace)`` returns an exit status and raises MatGPTQError."""
    verb = subparsers.add_parser("tune", help="measure the fastest kernel configurations on this GPU", description=DESCRIPTION)
    verb.add_argument("--model", type=Path, metavar="DIR", help="a parent: its shapes and group size are measured")
    verb.add_argument("--shapes", metavar="NxK,...", help=f"outputs x inputs of every product, or names of {', '.join(MODELS)}")
    verb.add_argument("--group-size", help="weights per scale, -1 for one per channel (default: the parent's, or 128)")
    verb.add_argument(
        "--widths", default=",".join(WIDTHS_CLASSES), help="replicas of a single width, or of several; default %(default)s"
    )
    verb.add_argument("--m", default=DEFAULT_MS, help="ranges of M, named by their largest; default %(default)s")
    verb.add_argument("--seconds", default=f"{DEFAULT_SECONDS:g}", help="time allowed for everything; default %(default)s")
    verb.add_argument(
        "--out", type=Path, metavar="FILE", help=f"table to add to (default: this GPU's, in {DIRECTORY_VARIABLE} or the cache)"
    )
    verb.add_argument("--workers", default="0", help="processes that compile; default: one per processor")
    verb.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Measure, write the table and print what was gained."""
    options = options_from(namespace)
    from matgptq_vllm.kernels.tune.run import run_tuning

    print(run_tuning(options))
    return 0


def options_from(namespace: argparse.Namespace) -> TuneOptions:
    """Checked options; InputError names the option that is wrong."""
    parent = ParentSummary(namespace.model) if namespace.model is not None else None
    shapes = parse_shapes(namespace.shapes) if namespace.shapes else ()
    if parent is not None:
        shapes = tuple(dict.fromkeys((*shapes, *shapes_of(parent))))
    own_group_size = parent.spec.group_size if parent is not None else TuneOptions.group_size
    given = namespace.group_size
    return TuneOptions(
        shapes=shapes,
        group_size=own_group_size if given is None else int(_number("--group-size", given)),
        widths=parse_list("--widths", namespace.widths, str),
        ms=parse_list("--m", namespace.m, int),
        seconds=_number("--seconds", namespace.seconds),
        out=namespace.out,
        workers=int(_number("--workers", namespace.workers)),
    )


def _number(option: str, text: str) -> float:
    try:
        return float(text) if option == "--seconds" else int(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is not a number") from None
