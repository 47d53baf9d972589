"""A replica as the router sees one: an HTTP server that says what it holds and answers as it is told to."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeReplica:
    """Answers with its own name. A context manager.

    Args:
        name: what it answers.
        precisions: average bits of each precision that it holds, by name.
        step_ms: time per token of each, for a request alone.
    """

    def __init__(self, name: str, precisions: dict[str, float], step_ms: float | None = None):
        self.name = name
        self.precisions = precisions
        self.step_ms = step_ms
        self.draining = False
        """Refuse every request with 503, and be unhealthy."""
        self.hold_before = threading.Event()
        """Until it is set, no byte of an answer is sent."""
        self.hold_within = threading.Event()
        """Until it is set, answers stop after their first byte."""
        self.hold_before.set()
        self.hold_within.set()
        self.received = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._connections: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeReplica":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Listen no more, and break all connections off."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            connection.close_now()
        self.hold_before.set()
        self.hold_within.set()

    def wait_for(self, requests: int) -> None:
        """Until it has received so many requests for generation."""
        deadline = time.monotonic() + 10
        while self.received < requests:
            assert time.monotonic() < deadline, f"{self.name} received {self.received} requests, not {requests}"
            time.sleep(0.01)


def _handler(replica: FakeReplica) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            replica._connections.append(self)

        def close_now(self) -> None:
            self.dead = True
            # Both directions, so that the thread that reads or writes sees it.
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

        def do_GET(self) -> None:
            if self.path == "/health" and replica.draining:
                self._answer(503, b"draining")
                return
            entries = [
                {"id": name, "average_bits": bits, "step_ms": {"1": replica.step_ms}}
                for name, bits in replica.precisions.items()
            ]
            self._answer(200, json.dumps({"data": entries, "name": replica.name}).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            replica.received += 1
            if replica.draining:
                self._answer(503, b"draining")
                return
            replica.hold_before.wait(30)
            if not getattr(self, "dead", False):
                self._answer(200, replica.name.encode())

        def _answer(self, status: int, body: bytes) -> None:
            # A health check hangs up as soon as it knows.
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:1])
                if self.command == "POST":
                    replica.hold_within.wait(30)
                if not getattr(self, "dead", False):
                    self.wfile.write(body[1:])

        def log_message(self, *_: object) -> None:
            pass

    return Handler
