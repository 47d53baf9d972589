"""``matgptq serve DIR``: vLLM's own OpenAI server on a parent, with a precision per request."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from matgptq_vllm.core.errors import InputError, UnsupportedError
from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.core.summary import ParentSummary
from serve.command import vllm_arguments
from serve.environment import ALLOWLIST, server_environment
from serve.settings import Settings, env_name

DESCRIPTION = """\
Serve a parent with vLLM's own OpenAI-compatible server. Every request may choose the precision that it is computed at:
by the header `X-Precision: 4`, the body field "precision", or the model name NAME@4. Requests of different precisions
share one engine and its batches. GET /v1/precisions lists what can be asked for, /metrics counts it.

Every argument that is not listed here goes to `vllm serve`, for instance --port, --api-key, --max-model-len."""

EPILOG = """\
examples:
  matgptq serve parent --port 8000
  matgptq serve parent --max-width 4 --served-model-name llama --api-key secret
  matgptq serve parent --default-precision 4 --dry-run
"""


def add_verbs(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb ``serve``; its ``run(namespace)`` returns an exit status and raises MatGPTQError."""
    # No prefix character: vLLM's options are not ours to parse, so that all of them arrive here as plain arguments.
    verb = subparsers.add_parser(
        "serve", help="serve a parent over HTTP, with a precision per request", add_help=False, prefix_chars="\0"
    )
    verb.add_argument("arguments", nargs=argparse.REMAINDER)
    verb.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Become the server process: signals and the process id are the server's. Returns only for --dry-run.

    Raises:
        InputError: the arguments contradict each other or the parent. FormatError: the folder is not a whole parent.
        UnsupportedError: vLLM is not installed.
    """
    own, rest = _own_parser().parse_known_args(namespace.arguments)
    directory, vllm_args = _split_directory(rest)
    options = ReplicaOptions(max_width=own.max_width, default_precision=own.default_precision)
    profiles = ParentSummary(directory).profiles(options.max_width)
    catalogue = options.catalogue(profiles)
    arguments = vllm_arguments(directory, vllm_args, options, catalogue.profiles)
    points = [point for distribution in distributions() for point in distribution.entry_points]
    environment = server_environment(os.environ, points)
    settings = {env_name("max_body_bytes"): str(own.max_body_bytes)} if own.max_body_bytes is not None else {}
    environment.update(settings)
    Settings.from_env(environment)
    command = [*_vllm(), *arguments]
    if own.dry_run:
        shown = {ALLOWLIST: environment[ALLOWLIST], **settings}
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in shown.items()), shlex.join(command)]))
        return 0
    if find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed in this environment; install matgptq-vllm with the extra gpu or cpu")
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matgptq serve",
        usage="%(prog)s DIR [options] [any argument of `vllm serve`]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--max-width",
        type=int,
        choices=WIDTHS,
        default=PARENT_WIDTH,
        metavar="R",
        help="widest width to serve; lower planes are neither read nor held: one of 2, 3, 4, 6, 8 (default: 8)",
    )
    parser.add_argument(
        "--default-precision",
        metavar="P",
        help="profile of requests that ask for none (default: the uniform profile of --max-width)",
    )
    parser.add_argument(
        "--max-body-bytes", type=int, metavar="N", help=f"largest request body (default: {Settings.max_body_bytes})"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    return parser


def _split_directory(arguments: Sequence[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        found = f"; found {arguments[0]} first" if arguments else ""
        raise InputError(
            f"matgptq serve needs the folder of a parent before any argument of vLLM{found}: matgptq serve DIR ..."
        )
    return arguments[0], list(arguments[1:])


def _vllm() -> list[str]:
    # The installed script, not `python -m`: the latter would import a folder named vllm from the working directory.
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
