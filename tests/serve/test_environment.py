"""Which vLLM plugins the server process loads."""

from importlib.metadata import EntryPoint, distribution

import pytest

from matgptq_vllm.core.errors import InputError
from serve.environment import CPU_CACHE, CPU_CACHE_GIB, KEEP_ALIVE, KEEP_ALIVE_S, PLUGINS, server_environment

INSTALLED = [
    EntryPoint("matgptq", "x:y", "vllm.general_plugins"),
    EntryPoint("matgptq_endpoints", "x:y", "vllm.endpoint_plugins"),
    EntryPoint("lora", "x:y", "vllm.general_plugins"),
    EntryPoint("lora", "x:y", "vllm.general_plugins"),
    EntryPoint("chip", "x:y", "vllm.platform_plugins"),
    EntryPoint("routes", "x:y", "vllm.endpoint_plugins"),
    EntryPoint("tool", "x:y", "console_scripts"),
]


def test_without_an_allowlist_all_that_loads_by_itself_still_loads():
    environment = server_environment({"A": "b"}, INSTALLED)
    assert environment == {"A": "b", "VLLM_PLUGINS": "chip,lora," + ",".join(PLUGINS), KEEP_ALIVE: KEEP_ALIVE_S}


def test_idle_connections_are_kept_longer_than_clients_and_proxies_do_unless_the_operator_decides() -> None:
    assert int(server_environment({}, INSTALLED)[KEEP_ALIVE]) > 60
    assert server_environment({KEEP_ALIVE: "5"}, INSTALLED)[KEEP_ALIVE] == "5"


def test_the_cache_on_a_cpu_is_bounded_unless_the_operator_decides() -> None:
    assert CPU_CACHE not in server_environment({}, INSTALLED)
    assert server_environment({}, INSTALLED, bound_cpu_cache=True)[CPU_CACHE] == CPU_CACHE_GIB
    assert server_environment({CPU_CACHE: "9"}, INSTALLED, bound_cpu_cache=True)[CPU_CACHE] == "9"


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ("", PLUGINS),
        ("lora", ("lora", *PLUGINS)),
        ("routes, matgptq", ("routes", "matgptq", *PLUGINS[1:])),
    ],
)
def test_an_operators_allowlist_is_kept_and_ours_added(given, listed):
    assert server_environment({"VLLM_PLUGINS": given}, INSTALLED)["VLLM_PLUGINS"] == ",".join(listed)


def test_the_names_are_those_of_the_entry_points():
    points = [point for point in distribution("matgptq-vllm").entry_points if point.group.startswith("vllm.")]
    assert {point.name for point in points} == set(PLUGINS)


def test_a_front_end_without_middleware_is_refused():
    with pytest.raises(InputError, match="VLLM_USE_RUST_FRONTEND"):
        server_environment({"VLLM_USE_RUST_FRONTEND": "1"}, [])
    server_environment({"VLLM_USE_RUST_FRONTEND": "0"}, [])
