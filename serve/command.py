"""The ``vllm serve`` command of a replica: the operator's own vLLM arguments, plus what makes it a MatGPTQ replica."""

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import QUANT_METHOD
from matgptq_vllm.core.precision import alias
from matgptq_vllm.core.replica import ADDITIONAL_CONFIG_KEY, SELF_DRAFT_CLASS, ReplicaOptions

WORKER_CLASS = "matgptq_vllm.compat.worker.MatGPTQWorker"
SCHEDULER_CLASS = "matgptq_vllm.compat.scheduler.MatGPTQScheduler"

SERVED_NAME = "--served-model-name"
ADDITIONAL_CONFIG = "--additional-config"
WORKER = "--worker-cls"
SCHEDULER = "--scheduler-cls"
QUANTIZATION = "--quantization"
SPECULATIVE_CONFIG = "--speculative-config"
CONFIG_FILE = "--config"

OWNED = {WORKER: ("auto", WORKER_CLASS), SCHEDULER: (SCHEDULER_CLASS,), QUANTIZATION: (QUANT_METHOD,)}
"""vLLM options that a replica decides, and the values with which an operator may repeat that decision."""

READ = (SERVED_NAME, ADDITIONAL_CONFIG, SPECULATIVE_CONFIG, *OWNED)
"""vLLM options that are looked at; every other one passes through."""


GRAPH_TOKENS = 512
"""Tokens of the largest step with a CUDA graph, unless the operator decides: vLLM stops at twice its --max-num-seqs, and a step
without a graph takes as long as the host needs to launch it, 30 ms and more."""

CAPTURE_SIZE = "--max-cudagraph-capture-size"
DECIDES_GRAPHS = (
    CAPTURE_SIZE, "--cudagraph-capture-sizes", "--compilation-config", "-cc", "-O", "--optimization-level", "--enforce-eager",
)  # fmt: skip
"""vLLM options by which an operator decides about graphs."""

DECIDES_CACHE = ("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--num-gpu-blocks-override")
"""vLLM options by which an operator decides how large the KV cache is."""

DRAFT_TOKENS = 2
"""Tokens drafted at a time, unless the operator says otherwise."""


def vllm_arguments(
    directory: str,
    vllm_args: Sequence[str],
    options: ReplicaOptions,
    profiles: Sequence[str],
    draft_tokens: int | None = None,
) -> list[str]:
    """The arguments of ``vllm`` that serve the parent in ``directory``.

    Args:
        vllm_args: the operator's own arguments of ``vllm serve``, without the model.
        profiles: names of the profiles that the replica holds; each gets an alias of every served name.
        draft_tokens: tokens drafted at a time where ``options`` have a draft width; None for DRAFT_TOKENS.

    Raises:
        InputError: an argument contradicts what makes the server a MatGPTQ replica, or is written in a way that it
            cannot be merged with ours.
    """
    given, passed = _split(vllm_args)
    for option, allowed in OWNED.items():
        value = given[option]
        if value is not None and value not in allowed:
            raise InputError(f"{option} {value} cannot be used with a MatGPTQ replica, which needs {allowed[-1]}; leave it out")
    names = given[SERVED_NAME] or [directory]
    aliases = [alias(name, profile) for name in names for profile in profiles]
    return [
        "serve",
        directory,
        *passed,
        SERVED_NAME,
        *names,
        *(name for name in aliases if name not in names),
        WORKER,
        WORKER_CLASS,
        SCHEDULER,
        SCHEDULER_CLASS,
        *_capture_size(passed),
        *_speculative_config(given[SPECULATIVE_CONFIG], passed, options.draft_width, draft_tokens),
        ADDITIONAL_CONFIG,
        json.dumps({**_additional_config(given[ADDITIONAL_CONFIG]), **options.to_additional_config()}),
    ]


def engine_layout(vllm_args: Sequence[str]) -> tuple[bool, int | None]:
    """How the engine will hold the weights: whether in the kernel layout, and bytes per weight that is not quantized.

    The second is None where such weights stay as they are stored. Where no vLLM is installed, a GPU's is assumed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default="auto")
    dtype = parser.parse_known_args([_normalized(argument) for argument in vllm_args])[0].dtype
    itemsize = {"auto": None, "float32": 4, "float": 4}.get(dtype, 2)
    return not _on_cpu() and itemsize != 4, itemsize


def needs_cache_bound(vllm_args: Sequence[str]) -> bool:
    """Whether the engine runs on a CPU and the operator's arguments say nothing of the size of its KV cache."""
    return _on_cpu() and not _decides(vllm_args, DECIDES_CACHE)


def _on_cpu() -> bool:
    """Whether the vLLM that is installed was built for CPUs; so it decides itself."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


def _split(vllm_args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of READ (None where not given), and every other argument in order."""
    parser = argparse.ArgumentParser(prog="matgptq serve", add_help=False, allow_abbrev=False, argument_default=None)
    parser.add_argument(SERVED_NAME, nargs="+", dest=SERVED_NAME)
    for option in READ[1:]:
        parser.add_argument(option, *(["-q"] if option == QUANTIZATION else []), dest=option)
    parser.error = _raise  # type: ignore[method-assign,assignment]  # argparse would print and exit
    known, passed = parser.parse_known_args([_normalized(argument) for argument in vllm_args])
    for argument in passed:
        _check_passed(argument)
    return vars(known), passed


def _check_passed(argument: str) -> None:
    name = argument.split("=")[0]
    if name == CONFIG_FILE:
        raise InputError(
            f"{CONFIG_FILE} cannot be used with `matgptq serve`, which has to see every option; give them as arguments"
        )
    if name.split(".")[0] == ADDITIONAL_CONFIG:
        raise InputError(f"{name} cannot be merged with this replica's own; write {ADDITIONAL_CONFIG} '{{...}}'")
    # vLLM accepts unambiguous abbreviations; one that is not seen here would override what the replica needs.
    owner = next((option for option in READ if len(name) > 3 and option.startswith(name)), None)
    if owner is not None:
        raise InputError(f"{name} looks like an abbreviation of {owner}; write it in full")


def _capture_size(passed: Sequence[str]) -> list[str]:
    """The argument for graphs of steps of up to GRAPH_TOKENS; none if the operator decides."""
    return [] if _decides(passed, DECIDES_GRAPHS) else [CAPTURE_SIZE, str(GRAPH_TOKENS)]


def _decides(arguments: Sequence[str], options: tuple[str, ...]) -> bool:
    """Whether one of ``arguments`` is, or begins as, one of ``options``."""
    return any(_normalized(argument).split("=")[0].split(".")[0].startswith(options) for argument in arguments)


def _normalized(argument: str) -> str:
    """``--some_option=value`` as ``--some-option=value``, as vLLM reads it."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    head, dot, tail = name.partition(".")
    return head.replace("_", "-") + dot + tail + separator + value


def _additional_config(text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"{ADDITIONAL_CONFIG} is not JSON ({error}); write it as '{{\"key\": value}}'") from None
    if not isinstance(config, dict):
        raise InputError(f"{ADDITIONAL_CONFIG} is {text}; an object is needed, such as '{{\"key\": value}}'")
    if ADDITIONAL_CONFIG_KEY in config:
        raise InputError(
            f"{ADDITIONAL_CONFIG} has {ADDITIONAL_CONFIG_KEY!r}, which `matgptq serve` sets itself; use --max-width, "
            "--memory-budget and --default-precision"
        )
    return config


def _speculative_config(
    given: str | None, passed: Sequence[str], draft_width: int | None, draft_tokens: int | None
) -> list[str]:
    """The option as arguments: the operator's own, or the one for drafting by a narrow slice."""
    if draft_width is None:
        if draft_tokens is not None:
            raise InputError(f"--draft-tokens is {draft_tokens}, but no width is to draft; add --draft-width")
        return [] if given is None else [SPECULATIVE_CONFIG, given]
    others = [argument for argument in passed if argument.split("=")[0].split(".")[0].startswith(("--spec", "-sc"))]
    if given is not None or others:
        raise InputError(f"{[SPECULATIVE_CONFIG, *others][-1]} and --draft-width exclude each other; leave one out")
    tokens = DRAFT_TOKENS if draft_tokens is None else draft_tokens
    if tokens < 1:
        raise InputError(f"--draft-tokens is {tokens}; draft 1 token or more")
    config = {"method": "custom_class", "model": SELF_DRAFT_CLASS, "num_speculative_tokens": tokens}
    return [SPECULATIVE_CONFIG, json.dumps(config)]


def _raise(message: str) -> None:
    raise InputError(message)
