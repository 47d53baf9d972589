"""Fixtures of the end-to-end tests: real servers of the calibrated example model, one per model runner."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .replica_server import ReplicaServer

ADMIN_KEY = "admin-key-of-the-tests"


@pytest.fixture(scope="session")
def servers(profiled_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ReplicaServer]]:
    """Running servers by model runner, each started by the first test that asks for it."""
    started: dict[str, ReplicaServer] = {}
    yield started
    for server in started.values():
        server.__exit__()


@pytest.fixture(params=["v1", "v2"])
def server(
    request: pytest.FixtureRequest,
    servers: dict[str, ReplicaServer],
    profiled_parent: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> ReplicaServer:
    """A server on each of vLLM's model runners."""
    return _started(request.param, servers, profiled_parent, tmp_path_factory)


@pytest.fixture
def v1_server(
    servers: dict[str, ReplicaServer], profiled_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> ReplicaServer:
    """A server on runner V1, for what does not depend on the runner."""
    return _started("v1", servers, profiled_parent, tmp_path_factory)


def _started(
    runner: str, servers: dict[str, ReplicaServer], parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> ReplicaServer:
    if runner not in servers:
        log = tmp_path_factory.mktemp(f"server-{runner}") / "server.log"
        servers[runner] = ReplicaServer(parent, log, runner=runner, environment={"MATGPTQ_ADMIN_KEY": ADMIN_KEY}).__enter__()
    return servers[runner]
