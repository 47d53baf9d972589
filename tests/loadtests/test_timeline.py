"""loadtests.timeline: what samples come to, and that a command is run and watched."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loadtests.timeline import main, sample, token_time

DOCUMENT = {
    "data": [{"id": "2", "average_bits": 2.0}, {"id": "8", "average_bits": 8.0}],
    "load": {"running": {"2": 1, "8": 2}, "waiting": 4},
    "latency_model": {"mean_error": 0.1, "coefficients": {"base": 2.0}},
}
METRICS = """\
# HELP vllm:inter_token_latency_seconds Time between tokens.
vllm:inter_token_latency_seconds_bucket{le="0.1",engine="0"} 7.0
vllm:inter_token_latency_seconds_sum{engine="0"} 1.5
vllm:inter_token_latency_seconds_count{engine="0"} 30.0
vllm:inter_token_latency_seconds_sum{engine="1"} 0.5
vllm:inter_token_latency_seconds_count{engine="1"} 10.0
"""


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = (json.dumps(DOCUMENT) if self.path == "/v1/precisions" else METRICS).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_engines_are_summed() -> None:
    assert token_time(METRICS) == (2.0, 40.0)


def test_a_sample_is_the_mean_width_of_what_runs_and_the_time_per_token_since_the_last() -> None:
    found = sample(DOCUMENT, (1.0, 20.0), (2.0, 40.0), 3.0)
    assert (found.running, found.waiting, found.width, found.token_ms) == (3, 4, 6.0, 50.0)
    idle = sample({**DOCUMENT, "load": {"running": {}, "waiting": 0}}, (1.0, 20.0), (1.0, 20.0), 3.0)
    assert (idle.width, idle.token_ms) == (None, None)


def test_a_command_is_watched_and_its_status_returned(url, tmp_path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(1.3); raise SystemExit(3)"]
    assert main([url, "--out", str(tmp_path), "--budget-ms", "40", "--", *command]) == 3
    document = json.loads((tmp_path / "timeline.json").read_text())
    assert document["latency_model"] == DOCUMENT["latency_model"]
    samples = document["samples"]
    assert samples
    assert {found["width"] for found in samples} == {6.0}
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
