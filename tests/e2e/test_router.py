"""matgptq route in front of real replicas: one is killed under load."""

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from matgptq_vllm.cli import main

from .replica_server import MODEL_NAME, ReplicaServer, free_port

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs HAProxy: apt-get install haproxy"),
]

CLIENTS = 6


@pytest.fixture
def narrow(profiled_parent: Path, tmp_path: Path) -> Iterator[ReplicaServer]:
    with ReplicaServer(profiled_parent, tmp_path / "narrow.log", ["--max-width", "4"]) as server:
        yield server


@pytest.fixture
def router(v1_server: ReplicaServer, narrow: ReplicaServer, tmp_path: Path) -> Iterator[str]:
    """URL of a router in front of a wide and a narrow replica."""
    config, port = tmp_path / "haproxy.cfg", free_port()
    replicas = ["--replica", f"wide={v1_server.url}", "--replica", f"narrow={narrow.url}"]
    addresses = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{free_port()}"]
    assert main(["route", *replicas, *addresses, "--out", str(config)]) == 0
    process = subprocess.Popen(["haproxy", "-W", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def test_a_replica_killed_under_load_takes_nothing_but_the_answers_it_had_begun(
    router: str, v1_server: ReplicaServer, narrow: ReplicaServer
) -> None:
    def tokens(server: ReplicaServer) -> dict[str, int]:
        return httpx.get(f"{server.url}/v1/precisions").json()["workers"][0]["tokens"]

    def ask(precision: str) -> tuple[str, bool]:
        """How a request ended, and whether its answer had begun."""
        body = {"model": MODEL_NAME, "prompt": "The old man", "max_tokens": 24, "ignore_eos": True, "stream": True}
        headers, begun = {"X-Precision": precision}, False
        try:
            with httpx.stream("POST", f"{router}/v1/completions", json=body, headers=headers, timeout=120) as answer:
                if answer.is_error:
                    return str(answer.status_code), begun
                assert answer.headers["X-Precision"] == precision
                begun = True
                return ("completed" if "[DONE]" in "".join(answer.iter_text()) else "broken off"), begun
        except httpx.TransportError:
            return "broken off", begun

    wide_before = tokens(v1_server)
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert {outcome for outcome, _ in pool.map(ask, ["4"] * CLIENTS)} == {"completed"}
        # All of it was the narrow replica's work.
        assert tokens(v1_server) == wide_before
        assert tokens(narrow)["4"] >= CLIENTS * 24
        load = [pool.submit(ask, "4") for _ in range(5 * CLIENTS)]
        while sum(one.done() for one in load) < CLIENTS:
            time.sleep(0.01)
        # All of it at once, as when a machine fails; the engine would outlive its API process.
        for process in (*psutil.Process(narrow.process.pid).children(recursive=True), psutil.Process(narrow.process.pid)):
            process.kill()
        ended = Counter(one.result(120) for one in load)
    # What had begun there is lost, at most as many as there were in flight; nothing else is.
    assert set(ended) <= {("completed", True), ("broken off", True)}, ended
    assert ended["broken off", True] <= CLIENTS
    assert tokens(v1_server)["4"] > wide_before["4"]
    assert ask("8") == ("completed", True)
