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
from matgptq_vllm.core.precision import AUTO, PARENT_WIDTH, WIDTHS, Catalogue
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.core.resident_bytes import resident_bytes
from matgptq_vllm.core.summary import ParentSummary
from serve.command import DRAFT_TOKENS, engine_layout, needs_cache_bound, vllm_arguments
from serve.environment import ALLOWLIST, CPU_CACHE, server_environment
from serve.settings import Settings, to_env
from serve.tenant_file import load_tenants

DESCRIPTION = """\
Serve a parent with vLLM's own OpenAI-compatible server. Every request may choose the precision that it is computed at:
by the header `X-Precision: 4`, the body field "precision", or the model name NAME@4; or say what it needs, by the
headers X-Latency-Budget-Ms and X-TTFT-Budget-Ms. Requests of different precisions share one engine and its batches.
GET /v1/precisions lists what can be asked for, /metrics counts it, /playground shows it.

Every argument that is not listed here goes to `vllm serve`, for instance --port, --api-key, --max-model-len."""

EPILOG = """\
examples:
  matgptq serve parent --port 8000
  matgptq serve parent --max-width 4 --served-model-name llama --api-key secret
  matgptq serve parent --default-precision auto --tpot-slo-ms 30 --auto-floor 3
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
    default_auto = own.default_precision == AUTO
    options = ReplicaOptions(
        max_width=own.max_width,
        default_precision=None if default_auto else own.default_precision,
        graph_widths=_widths(own.graph_widths),
        draft_width=own.draft_width,
        memory_budget=own.memory_budget,
    )
    parent = ParentSummary(directory)
    held = options
    if options.memory_budget is not None:
        held = options.within_budget(resident_bytes(parent, *engine_layout(vllm_args)))
    catalogue = held.catalogue(parent.profiles(held.max_width))
    if own.auto_floor is not None:
        catalogue.resolve(own.auto_floor)
    arguments = vllm_arguments(directory, vllm_args, options, catalogue.profiles, own.draft_tokens)
    points = [point for distribution in distributions() for point in distribution.entry_points]
    environment = server_environment(os.environ, points, needs_cache_bound(vllm_args))
    settings = to_env(
        {
            "max_body_bytes": own.max_body_bytes,
            "tpot_slo_ms": own.tpot_slo_ms,
            "ttft_slo_ms": own.ttft_slo_ms,
            "auto_floor": own.auto_floor,
            "default_auto": default_auto or None,
            "elastic_running": own.elastic_running or None,
            "tenants_file": own.tenants,
            "sweep_seconds": own.sweep_seconds,
            "drain_seconds": own.drain_seconds,
            "request_log": own.request_log or None,
        }
    )
    environment.update(settings)
    _check_tenants(Settings.from_env(environment), vllm_args, catalogue)
    command = [*_vllm(), *arguments]
    if own.dry_run:
        shown = {name: environment[name] for name in (ALLOWLIST, CPU_CACHE) if name in environment} | settings
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in shown.items()), shlex.join(command)]))
        return 0
    if find_spec("vllm") is None:
        raise UnsupportedError("vLLM is not installed in this environment; install matgptq-vllm with the extra gpu or cpu")
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def _check_tenants(settings: Settings, vllm_args: Sequence[str], catalogue: Catalogue) -> None:
    """Refuse what cannot work now rather than when the model is loaded."""
    if settings.tenants_file is None:
        return
    given = {argument.split("=")[0].replace("_", "-") for argument in vllm_args}
    if "--api-key" in given:
        raise InputError("--api-key and --tenants exclude each other: the keys of the tenants are the server's keys")
    if "--api-server-count" in given:
        raise InputError("--api-server-count and --tenants exclude each other: every API process would count quotas for itself")
    load_tenants(Path(settings.tenants_file), catalogue)


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
        "--memory-budget",
        metavar="SIZE",
        help="bytes that all weights together may take, such as 6GiB: serve the widest width up to --max-width that fits",
    )
    parser.add_argument(
        "--default-precision",
        metavar="P",
        help="profile of requests that ask for none, or `auto` (default: the uniform profile of --max-width)",
    )
    parser.add_argument(
        "--graph-widths",
        metavar="R,...",
        help="widths whose small decode batches get CUDA graphs of their own, if no other width is in them; `none` saves their "
        "memory and time to capture (default: all, on a GPU)",
    )
    parser.add_argument(
        "--draft-width",
        type=int,
        metavar="R",
        help="let the slice of this width draft tokens that the wider slice of a request verifies (default: no drafting)",
    )
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help=f"tokens drafted at a time (default: {DRAFT_TOKENS}; needs --draft-width)"
    )
    parser.add_argument(
        "--tpot-slo-ms",
        type=float,
        metavar="MS",
        help="time per output token that `auto` requests without a budget of their own aim at",
    )
    parser.add_argument(
        "--ttft-slo-ms",
        type=float,
        metavar="MS",
        help="time to the first token that `auto` requests without a budget of their own aim at",
    )
    parser.add_argument("--auto-floor", metavar="P", help="narrowest profile that `auto` may choose (default: any)")
    parser.add_argument(
        "--elastic-running",
        action="store_true",
        help="let running `auto` requests change their precision with the load; requests that named theirs keep it",
    )
    parser.add_argument(
        "--tenants", metavar="FILE", help="YAML file of API keys, what each may ask for and how much; see docs/tenants.md"
    )
    parser.add_argument(
        "--sweep-seconds",
        type=float,
        metavar="S",
        help=f"longest time to measure step times at the first start; 0: none (default: {Settings.sweep_seconds:g})",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        help="longest time that answers under way get after SIGTERM, while new requests are refused; 0: none "
        f"(default: {Settings.drain_seconds:g})",
    )
    parser.add_argument("--request-log", action="store_true", help="write a JSON line per request to standard error")
    parser.add_argument(
        "--max-body-bytes", type=int, metavar="N", help=f"largest request body (default: {Settings.max_body_bytes})"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    return parser


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if text == "none":
        return ()
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise InputError(f"--graph-widths is {text!r}; write widths with commas between them, such as 4,8, or none") from None


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
