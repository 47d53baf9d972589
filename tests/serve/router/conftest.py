"""A real HAProxy in front of replicas."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from matgptq_vllm.cli import main


@pytest.fixture
def route(tmp_path: Path) -> Iterator[Callable[..., httpx.Client]]:
    """``route(slots=32, wide=URL, narrow=URL)``: a client of the router that `matgptq route` makes."""
    if shutil.which("haproxy") is None:
        pytest.skip("needs HAProxy: apt-get install haproxy")
    started: list[subprocess.Popen[bytes]] = []
    clients: list[httpx.Client] = []

    def start(slots: int = 32, **replicas: str) -> httpx.Client:
        config = tmp_path / "haproxy.cfg"
        port, metrics = free_port(), free_port()
        named = [word for name, url in replicas.items() for word in ("--replica", f"{name}={url}")]
        addresses = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{metrics}"]
        assert main(["route", *named, *addresses, "--slots", str(slots), "--out", str(config)]) == 0
        log = (tmp_path / "haproxy.log").open("wb")
        started.append(subprocess.Popen(["haproxy", "-W", "-f", str(config)], stdout=log, stderr=subprocess.STDOUT))
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        clients.append(client)
        deadline = time.monotonic() + 10
        while True:
            try:
                assert "haproxy_server_status" in httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
                return client
            except httpx.TransportError:
                assert started[-1].poll() is None, (tmp_path / "haproxy.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    yield start
    for client in clients:
        client.close()
    for process in started:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
