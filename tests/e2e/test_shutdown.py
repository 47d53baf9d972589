"""A real server gets SIGTERM while it streams: the stream is finished, the next request refused, and the process ends."""

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

TOKENS = 300


def test_streams_under_way_are_finished_after_sigterm(parent_dir: Path, tmp_path: Path) -> None:
    with ReplicaServer(parent_dir, tmp_path / "server.log", ["--drain-seconds", "60"]) as server:
        assert httpx.get(f"{server.url}/ready").json() == {"ready": True, "problem": None}
        body = {
            "model": MODEL_NAME,
            "prompt": "The sea",
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.url}/ready").status_code == 200:
            assert time.monotonic() < deadline
        refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert reader.is_alive()
        reader.join(120)
        last = json.loads([line for line in lines if line.startswith("data: {")][-1].removeprefix("data: "))
        assert last["usage"]["completion_tokens"] == TOKENS
        assert lines[-2] == "data: [DONE]"
        assert server.process.wait(30) == 0
