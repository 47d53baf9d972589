"""Planes are dropped and read again under mixed traffic: nothing in flight is lost, and no answer changes."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from .conftest import ADMIN_KEY
from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

PROMPTS = ("The old man looked at the sea and", "It was a dark night, and the wind", "He")
NARROW, WIDE = ("2", "3", "4"), ("6", "8", "mix-depth")
ALL = (*NARROW, *WIDE)


def body(prompt: str, tokens: int = 8) -> dict:
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def ask(client: httpx.Client, precision: str, prompt: str, tokens: int = 8) -> httpx.Response:
    return client.post("/v1/completions", json=body(prompt, tokens), headers={"X-Precision": precision})


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def change(client: httpx.Client, max_width: int, **more: str) -> dict:
    answer = client.post(
        "/v1/precisions", json={"max_width": max_width, **more}, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def code_bytes(shown: dict) -> int:
    return sum(worker["code_bytes"] for worker in shown["workers"])


def restored(server: ReplicaServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
        change(client, 8)


@pytest.fixture
def any_client(server: ReplicaServer) -> Iterator[httpx.Client]:
    """A client of a server on each of the model runners; afterwards the server holds all planes again."""
    yield from restored(server)


@pytest.fixture
def client(v1_server: ReplicaServer) -> Iterator[httpx.Client]:
    """The same, for what does not depend on the runner."""
    yield from restored(v1_server)


def until_change_is_under_way(client: httpx.Client) -> dict:
    deadline = time.monotonic() + 20
    while (shown := client.get("/v1/precisions").json())["change"] is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert shown["change"] is not None
    return shown


def test_mixed_traffic_goes_on_while_planes_go_and_come_back(any_client: httpx.Client) -> None:
    client = any_client
    expected = {(precision, prompt): text(ask(client, precision, prompt)) for precision in ALL for prompt in PROMPTS}
    whole = client.get("/v1/precisions").json()
    stop = threading.Event()

    def traffic(precision: str) -> tuple[int, int]:
        answered = refused = 0
        while not stop.is_set():
            for prompt in PROMPTS:
                response = ask(client, precision, prompt)
                if response.status_code == 400 and precision in WIDE:
                    assert "ask for one of 2, 3, 4, auto" in response.json()["error"]["message"]
                    refused += 1
                else:
                    assert text(response) == expected[precision, prompt]
                    answered += 1
        return answered, refused

    with ThreadPoolExecutor(len(ALL)) as pool:
        running = {precision: pool.submit(traffic, precision) for precision in ALL}
        try:
            time.sleep(0.3)
            narrow = change(client, 4)
            time.sleep(0.3)
            assert client.get("/v1/precisions").json()["change"] is None
            again = change(client, 8)
            time.sleep(0.3)
        finally:
            stop.set()
        counts = {precision: future.result() for precision, future in running.items()}
    assert all(answered > 0 for answered, _ in counts.values())
    assert all((refused > 0) == (precision in WIDE) for precision, (_, refused) in counts.items())
    assert ([entry["id"] for entry in narrow["data"]], narrow["default"]) == (list(NARROW), "4")
    assert (narrow["max_width"], narrow["available_max_width"]) == (4, 8)
    assert (code_bytes(narrow), code_bytes(again)) == (code_bytes(whole) // 2, code_bytes(whole))
    assert {**again, "workers": 0, "decisions": 0, "load": 0, "latency_model": 0, "data": 0} == {
        **whole, "workers": 0, "decisions": 0, "load": 0, "latency_model": 0, "data": 0,
    }  # fmt: skip
    for (precision, prompt), wanted in expected.items():
        assert text(ask(client, precision, prompt)) == wanted


def test_what_runs_finishes_first_and_new_requests_are_refused_at_once(client: httpx.Client) -> None:
    wanted = text(ask(client, "8", PROMPTS[0], 300))
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, client, "8", PROMPTS[0], 300)
        while not client.get("/v1/precisions").json()["load"]["running"]:
            time.sleep(0.01)
        changing = pool.submit(change, client, 2)
        shown = until_change_is_under_way(client)
        assert shown["change"] == {"max_width": 2, "policy": "finish", "waiting_for": 1}
        assert code_bytes(shown) > 0
        assert ask(client, "8", "He").status_code == 400
        chosen = client.post("/v1/completions", json=body("He"), headers={"X-Precision": "auto"})
        unnamed = client.post("/v1/completions", json=body("He"))
        assert (chosen.headers["x-precision"], unnamed.headers["x-precision"]) == ("2", "2")
        busy = client.post("/v1/precisions", json={"max_width": 4}, headers={"X-API-Key": ADMIN_KEY})
        assert (busy.status_code, busy.json()["error"]["type"]) == (409, "ConflictError")
        assert not changing.done()
        assert text(long.result()) == wanted
        assert changing.result()["max_width"] == 2
    resident = [line for line in client.get("/metrics").text.splitlines() if line.startswith("matgptq_resident_bytes{")]
    held = code_bytes(client.get("/v1/precisions").json())
    assert [float(line.split()[-1]) for line in resident if 'kind="codes"' in line] == [held]


def test_what_runs_is_ended_with_the_reason_if_the_policy_says_so(client: httpx.Client) -> None:
    streaming = threading.Event()

    def stream() -> list[str]:
        asked = {**body(PROMPTS[1], 900), "stream": True}
        with client.stream("POST", "/v1/completions", json=asked, headers={"X-Precision": "8"}) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                streaming.set()
            return lines

    with ThreadPoolExecutor(2) as pool:
        whole, streamed = pool.submit(ask, client, "6", PROMPTS[0], 900), pool.submit(stream)
        while len(client.get("/v1/precisions").json()["load"]["running"]) < 2:
            time.sleep(0.01)
        assert streaming.wait(60)
        assert change(client, 3, policy="refuse")["max_width"] == 3
        assert whole.result().status_code == 409
        assert "max width 3; ask again for one of 2, 3, auto" in whole.result().json()["error"]["message"]
        lines = [line for line in streamed.result() if line]
    assert lines[0].startswith('data: {"id"')
    assert '"code": 409' in lines[-1]
    assert text(ask(client, "3", "He"))


def test_only_an_operator_changes_the_width_and_only_to_what_there_is(client: httpx.Client) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    assert client.post("/v1/precisions", json={"max_width": 4}).status_code == 403
    for wrong in ({}, {"max_width": 5}, {"max_width": "4"}, {"max_width": 4, "policy": "wait"}, {"max_width": 4, "x": 1}, [4]):
        assert client.post("/v1/precisions", json=wrong, headers=admin).status_code == 400
    # Without the engine's token, a client's own limit is an extra argument like any other.
    forged = {**body("He"), "vllm_xargs": {"matgptq_width_limit": 2}}
    assert client.post("/v1/completions", json=forged).status_code == 200
    assert client.get("/v1/precisions").json()["max_width"] == 8
