"""--elastic-running on a real server: under load a running ``auto`` request gets narrower, and no other request notices."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.metrics_text import by_label

from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

PROMPT = "The old man looked at the sea and thought of"
TOKENS = 400
CROWD = 24


@pytest.fixture(scope="module")
def elastic(profiled_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServer]:
    folder = tmp_path_factory.mktemp("elastic")
    arguments = ["--elastic-running", "--request-log", "--sweep-seconds", "20", "--max-num-seqs", "32"]
    environment = {"MATGPTQ_LATENCY_CACHE": str(folder / "latency")}
    with ReplicaServer(profiled_parent, folder / "server.log", arguments, environment=environment) as server:
        yield server


def test_a_running_auto_request_steps_down_and_a_named_width_answers_as_if_alone(elastic: ReplicaServer) -> None:
    named = {"X-Precision": "8"}
    with elastic.client() as client:
        alone = client.post("/v1/completions", json=request(64), headers=named).json()["choices"][0]["text"]
    # A machine that is slow when the first comes gives it the narrowest at once, and one that has become faster keeps a crowd
    # wide: then again, with what the server knows by now of its steps and another part of what a crowd adds.
    for attempt, part in enumerate((0.5, 0.35, 0.2, 0.5, 0.35, 0.2)):
        with elastic.client() as client:
            precisions = {entry["id"]: entry for entry in client.get("/v1/precisions").json()["data"]}
            before, computed = generated(client), tokens_computed(client)
        # The parent has a profile of several widths, which may be chosen too.
        bits = {name: entry["average_bits"] for name, entry in precisions.items()}
        step_ms = precisions["8"]["step_ms"]
        # One sequence at 8 meets it, a crowd does not.
        budget = {"X-Latency-Budget-Ms": str(round(step_ms["1"] + part * max(0, step_ms["32"] - step_ms["1"]), 2))}
        lines_before = len(answered(elastic))
        first, explicit, crowd = asyncio.run(scenario(elastic, budget, {**named, "X-Request-Id": f"explicit-{attempt}"}))
        assert {answer.status_code for answer in (first, explicit, *crowd)} == {200}
        log = answered(elastic)[lines_before:]
        # Some were admitted wider than they ended; the first may have gone back by its end, when the crowd was gone.
        changed = [line for line in log if bits[line["precision"]] > bits[line["last_precision"]]]
        # What the headers say is the precision at admission.
        if changed and bits[first.headers["x-precision"]] > min(bits.values()):
            break
    assert bits[first.headers["x-precision"]] > min(bits.values())
    assert explicit.headers["x-precision"] == "8"
    (named_line,) = [line for line in log if line["request_id"] == f"explicit-{attempt}"]
    assert named_line["last_precision"] == "8"
    assert explicit.json()["choices"][0]["text"] == alone
    assert changed
    assert {line["reason"] for line in changed} == {"budget"}
    with elastic.client() as client:
        after = generated(client)
        at_8 = tokens_computed(client)["8"] - computed["8"]
    # What the worker counted: had the first alone stayed at 8, it would have computed that many.
    assert at_8 < TOKENS + 64
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert sum(gained.values()) == TOKENS + 100 * CROWD + 64
    assert sum(count for name, count in gained.items() if name != "8") > 0


async def scenario(
    server: ReplicaServer, budget: dict[str, str], named: dict[str, str]
) -> tuple[httpx.Response, httpx.Response, list[httpx.Response]]:
    """A long request with the budget; after a second a crowd of them, and one that names its width."""
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

        def send(tokens: int, headers: dict[str, str]) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.post("/v1/completions", json=request(tokens), headers=headers))

        first = send(TOKENS, budget)
        await asyncio.sleep(1)
        crowd = [send(100, budget) for _ in range(CROWD)]
        explicit = send(64, named)
        return await first, await explicit, list(await asyncio.gather(*crowd))


def request(tokens: int) -> dict[str, Any]:
    return {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def generated(client: httpx.Client) -> dict[str, float]:
    return by_label(client.get("/metrics").text, "matgptq_generation_tokens_total", "precision")


def tokens_computed(client: httpx.Client) -> dict[str, int]:
    """By the worker, at each precision."""
    return client.get("/v1/precisions").json()["workers"][0]["tokens"]


def answered(server: ReplicaServer) -> list[dict[str, Any]]:
    """The request log's lines of requests that got an answer."""
    lines = [json.loads(line) for line in server.log_text().splitlines() if line.startswith('{"time"')]
    return [line for line in lines if line["status"] == 200]
