"""The graceful end, and readiness, of the middleware and the endpoint plugin in an application with a fake engine."""

import asyncio
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from serve.drain import Drain
from serve.readiness import READY_PATH, Readiness
from serve.settings import Settings

from .test_endpoints import Engine, make_app


class GeneratingEngine(Engine):
    """Also generates tokens, and lives or not."""

    alive = True
    generated = 1

    async def generate(self, prompt, parameters, request_id):
        self.asked = (prompt, parameters)
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * self.generated)])

    async def check_health(self):
        if not self.alive:
            raise RuntimeError("dead")


def test_an_answer_under_way_is_finished_and_the_next_request_refused(harness) -> None:
    async def while_answering(scope, receive, send) -> None:
        harness.drain.begin()
        assert harness.ended == []  # one answer is under way: this one
        refused = []

        async def refusal(message) -> None:
            refused.append(message)

        await harness.app({**scope, "headers": []}, receive, refusal)
        start, body = refused
        assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
        assert "another replica" in json.loads(body["body"])["error"]["message"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"whole", "more_body": False})

    harness.inner.behaviour = while_answering
    assert harness.call().chunks == [b"whole"]
    assert harness.count("matgptq_rejected_requests_total", reason="draining") == 1
    # What computes nothing is answered still: metrics, health.
    harness.inner.behaviour = None
    assert harness.call(path="/metrics", method="GET").status == 200
    for path in ("/v1/chat/completions", "/inference/v1/generate"):
        assert harness.call(path=path).status == 503


def test_a_body_that_comes_during_the_end_is_refused(harness) -> None:
    class Pieces(list):
        def pop(self, index=0):
            piece = super().pop(index)
            if len(self) == 0:
                harness.drain._waiting = object()
            return piece

    messages = Pieces(
        [
            {"type": "http.request", "body": piece, "more_body": more}
            for piece, more in ((b'{"prompt": ', True), (b'"a"}', False))
        ]
    )
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asyncio.run(harness.app(scope, receive, send))
    assert sent[0]["status"] == 503
    assert harness.inner.bodies == []


@pytest.mark.parametrize(("answer_s", "wait_s", "broken_off"), [(0.05, 5.0, False), (5.0, 0.05, True)])
def test_the_end_comes_after_the_last_answer_or_the_time(caplog, answer_s: float, wait_s: float, broken_off: bool) -> None:
    ended = []

    async def run() -> None:
        drain = Drain(wait_s, end=lambda: ended.append(drain.draining))

        async def answer() -> None:
            with drain.answering():
                await asyncio.sleep(answer_s)

        task = asyncio.create_task(answer())
        await asyncio.sleep(0.01)
        drain.begin()
        await asyncio.sleep(0)
        assert ended == []
        await asyncio.sleep(0.3)
        assert ended == [True]
        drain.begin()  # a second SIGTERM
        assert ended == [True, True]
        task.cancel()

    asyncio.run(run())
    assert ("broken off" in caplog.text) == broken_off


@pytest.mark.parametrize(("seconds", "printed"), [(30, "ended"), (0, "")])
def test_sigterm_becomes_sigint_when_nothing_is_under_way(seconds: int, printed: str) -> None:
    code = f"""
import asyncio, os, signal
from serve.drain import Drain
async def main():
    done = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, done.set)
    Drain({seconds}).install()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(done.wait(), 20)
    print("ended", end="")
asyncio.run(main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    # With 0 seconds the signal keeps its meaning: here, the process dies of it.
    assert (run.returncode, run.stdout) == (0 if printed else -signal.SIGTERM, printed)


def test_ready_is_after_the_first_token_and_until_the_engine_dies(report) -> None:
    engine = GeneratingEngine([report])
    client = TestClient(make_app(engine)[0])
    answer = client.get(READY_PATH)
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "problem": None})
    prompt, parameters = engine.asked
    assert (len(prompt["prompt_token_ids"]), parameters.max_tokens, parameters.extra_args) == (2, 1, {"precision": "8"})
    engine.alive = False
    answer = client.get(READY_PATH)
    assert answer.status_code == 503
    assert "RuntimeError" in answer.json()["problem"]


def test_not_ready_without_a_token(report, caplog) -> None:
    silent = GeneratingEngine([report])
    silent.generated = 0
    for engine in (silent, Engine([report])):  # no token; an error
        answer = TestClient(make_app(engine)[0]).get(READY_PATH)
        assert answer.status_code == 503
        assert "first token" in answer.json()["problem"]
    assert "AttributeError" in caplog.text


def test_an_engine_without_precisions_can_be_ready() -> None:
    engine = GeneratingEngine(RuntimeError("no such method"))
    client = TestClient(make_app(engine, worker_cls="auto")[0])
    assert client.get(READY_PATH).status_code == 200
    assert engine.asked[1].extra_args is None


def test_not_ready_before_and_after() -> None:
    async def problems() -> list[str | None]:
        drain = Drain(Settings().drain_seconds, end=lambda: None)
        readiness = Readiness(drain)
        before = await readiness.problem()
        drain.begin()
        return [before, await readiness.problem()]

    before, after = asyncio.run(problems())
    assert "not loaded" in before
    assert "shutting down" in after
