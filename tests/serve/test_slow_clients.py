"""Slow clients and clients that go away, over real connections to uvicorn, the HTTP server that vLLM runs."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from serve.middleware import PrecisionMiddleware
from serve.settings import Settings

BODY = json.dumps({"prompt": "slow", "precision": 4}).encode()
PIECE = b"x" * 65536


class Stream:
    """In place of vLLM: reads the request, then sends pieces until all are sent or the client is gone."""

    def __init__(self) -> None:
        self.num_pieces = 1
        self.num_sent = 0

    async def __call__(self, scope, receive, send) -> None:
        assert (await receive())["more_body"] is False
        gone = asyncio.ensure_future(self._gone(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for index in range(self.num_pieces):
            if gone.done():
                return
            await send({"type": "http.response.body", "body": PIECE, "more_body": index < self.num_pieces - 1})
            self.num_sent += 1
        gone.cancel()

    async def _gone(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class Running:
    """The middleware on a port."""

    def __init__(self, harness) -> None:
        self.harness = harness
        self.stream = Stream()
        app = PrecisionMiddleware(
            self.stream, lambda: harness.control, Settings(), harness.metrics, harness.joined, harness.drain
        )
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "Running":
        self._thread.start()
        assert until(lambda: self._server.started)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def connect(self, sent: bytes = BODY, receive_buffer: int | None = None, announced: int = len(BODY)) -> socket.socket:
        """A connection whose request has these first bytes of its body."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", self.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {announced}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + sent)
        return connection

    @property
    def in_flight(self) -> int:
        return sum(self.harness.control.tracker.load().running.values()) + len(self.harness.joined.in_flight)

    def ended(self, status: str) -> float:
        return self.harness.count("matgptq_requests_total", precision="4", reason="body", status=status)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def running(harness) -> Iterator[Running]:
    with Running(harness) as started:
        yield started


def test_a_body_byte_by_byte_holds_nothing_until_it_is_whole(running: Running) -> None:
    with running.connect(b"") as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in BODY[:-1]:
            connection.sendall(bytes([byte]))
            time.sleep(0.001)
            assert running.in_flight == 0
        connection.sendall(BODY[-1:])
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"x-precision: 4" in answer
    assert until(lambda: running.ended("200") == 1)
    assert running.in_flight == 0


def test_a_client_that_goes_away_in_its_body_is_never_a_request(running: Running) -> None:
    for sent in (b"", BODY[:1], BODY[:-1]):
        running.connect(sent).close()
    with running.connect() as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert until(lambda: running.in_flight == 0)
    assert running.stream.num_sent == 1
    assert running.ended("499") == running.ended("500") == 0


def test_a_reader_that_stops_stalls_its_own_stream_alone_and_its_slot_is_free_when_it_goes(running: Running) -> None:
    running.stream.num_pieces = 1000  # 64 MB, more than the sockets' buffers hold
    stopped = running.connect(receive_buffer=4096)
    try:
        assert until(lambda: running.stream.num_sent > 0)
        before = -1
        while before != running.stream.num_sent:
            before = running.stream.num_sent
            time.sleep(0.3)
        # What is not read is not piled up here: the application waits.
        assert running.stream.num_sent < 1000
        assert running.in_flight == 2
        running.stream.num_pieces = 1
        with running.connect() as other:
            assert other.recv(12) == b"HTTP/1.1 200"
    finally:
        stopped.close()
    assert until(lambda: running.in_flight == 0)
    assert running.ended("499") == 1
