"""A verb's options as one frozen dataclass: fields that are command-line options, and the way from the command line to them.

Imports no torch: the command line is built from such dataclasses.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from matgptq_vllm.core.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEVICES = ("auto", "cpu", "cuda")

Verb = TypeVar("Verb", bound="DataclassInstance")
"""A frozen dataclass of options."""


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


def check_choices(options: Any) -> None:
    """InputError unless every field of ``options`` that has choices holds one of them, or None."""
    for spec in fields(options):
        choices, value = spec.metadata["choices"], getattr(options, spec.name)
        if choices and value is not None and value not in choices:
            raise InputError(f"{spec.name} {value!r} is not supported; use one of {listed(choices)}")


def check_at_least(name: str, value: int, least: int) -> None:
    """InputError unless ``value`` is at least ``least``."""
    if value < least:
        raise InputError(f"{name} is {value}; it must be {least} or more")


def listed(values: Any) -> str:
    """Values as they stand in a message."""
    return ", ".join(map(str, values))


def _allowed(choices: tuple) -> str:
    return f"; use one of {listed(choices)}" if choices else ""


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if not isinstance(default, Mapping):
        return str(default)
    return ",".join(f"{width}" if weight == 1 else f"{width}:{weight:g}" for width, weight in default.items())
