"""The environment of the server process: which vLLM plugins it loads, and how long it keeps idle connections."""

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint

from matgptq_vllm.core.errors import InputError

PLUGINS = ("matgptq", "matgptq_endpoints", "matgptq_stats")
"""Names of our entry points: the quantization method, the endpoints, the statistics."""

ALLOWLIST = "VLLM_PLUGINS"
RUST_FRONTEND = "VLLM_USE_RUST_FRONTEND"

VLLM_GROUPS = "vllm."
"""How the names of vLLM's entry point groups begin."""

OPT_IN_GROUP = "vllm.endpoint_plugins"
"""Plugins of this group add HTTP routes; vLLM loads only those that the allowlist names."""

KEEP_ALIVE, KEEP_ALIVE_S = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75"
"""vLLM closes a connection that is idle for 5 s, as long as many clients keep one for their next request: now and then both at
once, and the request is lost. Longer than nginx (60 s) and the clients keep them, it is they who close."""

CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "4"
"""vLLM's CPU build fills nine tenths of the machine's memory with keys and values. All else on the machine, the programs of the
server among it, is then read from disk again and again, and steps take seconds."""


def server_environment(
    environ: Mapping[str, str], installed: Iterable[EntryPoint], bound_cpu_cache: bool = False
) -> dict[str, str]:
    """``environ`` with an allowlist that loads our plugins and everything that would be loaded without them, and with idle
    connections kept for KEEP_ALIVE_S seconds unless the operator decides.

    vLLM's endpoint plugins are opt-in by that allowlist, and an allowlist holds for all groups once it is set. Hence an
    operator's list is kept and ours added; without one, every installed plugin is listed that vLLM loads by itself.

    Args:
        bound_cpu_cache: bound keys and values on a CPU to CPU_CACHE_GIB unless ``environ`` does.

    Raises:
        InputError: the environment selects a front end that runs no middleware, so no request could choose a precision.
    """
    if environ.get(RUST_FRONTEND, "0").strip().lower() not in ("", "0", "false"):
        raise InputError(f"{RUST_FRONTEND} is set, and that front end cannot choose precisions; unset it")
    if ALLOWLIST in environ:
        listed = [name.strip() for name in environ[ALLOWLIST].split(",") if name.strip()]
    else:
        by_itself = {point.name for point in installed if point.group.startswith(VLLM_GROUPS) and point.group != OPT_IN_GROUP}
        listed = sorted(by_itself - set(PLUGINS))
    listed += [name for name in PLUGINS if name not in listed]
    ours = {KEEP_ALIVE: KEEP_ALIVE_S, **({CPU_CACHE: CPU_CACHE_GIB} if bound_cpu_cache else {})}
    return {**ours, **environ, ALLOWLIST: ",".join(listed)}
