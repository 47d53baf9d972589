"""The HTTP API of a real server: the ways to choose a precision, what comes back, and what bad input gets."""

import json
import re

import httpx
import pytest
from openai import BadRequestError, OpenAI

from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

PROMPT = "The captain of the ship was"
PROFILES = ["2", "3", "4", "6", "8", "mix-kind", "mix-depth"]


def complete(client: httpx.Client, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1, **fields}
    return client.post("/v1/completions", json=body, headers=headers)


def logprobs(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["logprobs"]["token_logprobs"]


@pytest.fixture
def client(v1_server: ReplicaServer):
    with v1_server.client() as client:
        yield client


def test_header_body_xargs_and_alias_choose_the_same_slice(client: httpx.Client) -> None:
    answers = [
        complete(client, {"X-Precision": "3"}),
        complete(client, precision=3),
        complete(client, vllm_xargs={"precision": "3"}),
        complete(client, model=f"{MODEL_NAME}@3"),
    ]
    assert [answer.headers["x-precision"] for answer in answers] == ["3"] * 4
    assert [answer.headers["x-precision-reason"] for answer in answers] == ["header", "body", "body", "model"]
    by_header = logprobs(answers[0])
    for answer in answers[1:]:
        assert logprobs(answer) == pytest.approx(by_header, abs=1e-4)

    default = complete(client)
    assert (default.headers["x-precision"], default.headers["x-precision-reason"]) == ("8", "default")
    assert logprobs(default) != pytest.approx(by_header, abs=1e-2)
    assert logprobs(complete(client, {"X-Precision": "auto"})) == pytest.approx(logprobs(default), abs=1e-4)


def test_header_wins_over_body_and_body_over_alias(client: httpx.Client) -> None:
    everything = complete(client, {"X-Precision": "2"}, precision="4", model=f"{MODEL_NAME}@6")
    assert everything.headers["x-precision"] == "2"
    body = complete(client, precision="4", model=f"{MODEL_NAME}@6")
    assert body.headers["x-precision"] == "4"


def test_beams_are_computed_at_the_precision_that_was_asked_for(client: httpx.Client) -> None:
    texts = {}
    for precision in ("2", "8"):
        asked = {"headers": {"X-Precision": precision}, "ignore_eos": True, "logprobs": None}
        texts[precision] = complete(client, **asked).json()["choices"][0]["text"]
        # The salt is the client's own affair: it cannot choose.
        beams = complete(client, **asked, use_beam_search=True, n=1, cache_salt="precision=3")
        assert beams.headers["x-precision"] == precision
        assert beams.json()["choices"][0]["text"] == texts[precision]
    assert texts["2"] != texts["8"]


def test_models_lists_an_alias_for_every_profile(client: httpx.Client) -> None:
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == [MODEL_NAME, *(f"{MODEL_NAME}@{profile}" for profile in PROFILES)]


def test_precisions_endpoint_shows_what_is_loaded(client: httpx.Client) -> None:
    shown = client.get("/v1/precisions").json()
    assert [profile["id"] for profile in shown["data"]] == PROFILES
    assert (shown["default"], shown["max_width"], shown["slice_rule"]) == ("8", 8, "curved")
    by_name = {profile["id"]: profile for profile in shown["data"]}
    assert by_name["4"]["average_bits"] == 4
    assert by_name["4"]["bytes_per_weight"] == pytest.approx(0.5 + 2 / 128)
    assert 3 < by_name["mix-kind"]["average_bits"] < 6
    assert shown["workers"][0]["code_bytes"] == 6 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 768)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_with_the_openai_client(v1_server: ReplicaServer, stream: bool) -> None:
    openai = OpenAI(base_url=f"{v1_server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": PROMPT}]
    options = {"max_tokens": 8, "temperature": 0, "extra_body": {"precision": "4"}}
    raw = openai.chat.completions.with_raw_response.create(model=MODEL_NAME, messages=messages, stream=stream, **options)
    assert raw.headers["x-precision"] == "4"
    answer = raw.parse()
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
    else:
        text = answer.choices[0].message.content
    direct = openai.chat.completions.create(model=f"{MODEL_NAME}@4", messages=messages, max_tokens=8, temperature=0)
    assert text == direct.choices[0].message.content


def test_a_stream_arrives_in_pieces_that_make_the_whole_answer(client: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}, headers={"X-Precision": "2"}) as response:
        assert response.headers["x-precision"] == "2"
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    *pieces, end = events
    assert end == "[DONE]"
    assert len(pieces) > 3  # a fast server may put more than one token into a piece
    text = "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces)
    whole = client.post("/v1/completions", json=body, headers={"X-Precision": "2"}).json()
    assert text == whole["choices"][0]["text"]


def test_several_answers_of_one_request_share_its_precision(client: httpx.Client) -> None:
    answer = complete(client, {"X-Precision": "3"}, n=3, temperature=0.8, seed=1, prompt=[PROMPT, "He said"])
    assert answer.headers["x-precision"] == "3"
    assert len(answer.json()["choices"]) == 6


BAD_SELECTIONS = [
    pytest.param({"headers": [("X-Precision", "5")]}, id="unknown width"),
    pytest.param({"headers": [("X-Precision", "mix-9")]}, id="unknown profile"),
    pytest.param({"headers": [("X-Precision", "4; rm")]}, id="malformed"),
    pytest.param({"headers": [("X-Precision", "")]}, id="empty"),
    pytest.param({"headers": [("X-Precision", "4"), ("X-Precision", "4")]}, id="twice"),
    pytest.param({"headers": [("X-Precision", "4, 8")]}, id="list"),
    pytest.param({"json": {"precision": [4]}}, id="list in the body"),
    pytest.param({"json": {"precision": True}}, id="bool in the body"),
    pytest.param({"json": {"precision": 4.0}}, id="float in the body"),
    pytest.param({"json": {"precision": "4", "vllm_xargs": {"precision": "8"}}}, id="contradiction in the body"),
    pytest.param({"json": {"vllm_xargs": {"precision": "7"}}}, id="unknown in vllm_xargs"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("bad", BAD_SELECTIONS)
def test_a_bad_precision_is_refused_with_the_list(client: httpx.Client, bad: dict, path: str) -> None:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "messages": [{"role": "user", "content": "x"}], **bad.get("json", {})}
    response = client.post(path, json=body, headers=bad.get("headers"))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"
    for name in PROFILES:
        assert name in error["message"]


def test_the_openai_client_raises_its_bad_request_error(v1_server: ReplicaServer) -> None:
    openai = OpenAI(base_url=f"{v1_server.url}/v1", api_key="none")
    with pytest.raises(BadRequestError, match="mix-depth"):
        openai.completions.create(model=MODEL_NAME, prompt="a", extra_headers={"X-Precision": "16"})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"nul\x00l"])
def test_a_body_that_is_no_json_object_is_refused(client: httpx.Client, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"X-Precision": "4", "Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_too_large_is_refused(client: httpx.Client) -> None:
    text = json.dumps({"model": MODEL_NAME, "prompt": "a" * (17 << 20)})
    assert client.post("/v1/completions", content=text).status_code == 413

    def pieces():
        for start in range(0, len(text), 1 << 20):
            yield text[start : start + (1 << 20)].encode()

    assert client.post("/v1/completions", content=pieces()).status_code == 413


def test_after_all_bad_input_the_server_answers_as_before(client: httpx.Client) -> None:
    assert complete(client, {"X-Precision": "4"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_prefix_cache_is_shared_within_a_profile_and_never_across(client: httpx.Client) -> None:
    prompt = "It was the best of times, it was the worst of times. " * 20

    def cached(**choice) -> int:
        usage = complete(client, prompt=prompt, max_tokens=1, **choice).json()["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    assert cached(headers={"X-Precision": "4"}) == 0
    full = cached(headers={"X-Precision": "4"})
    assert full > 100
    # The same profile by another way in finds the same blocks; another profile finds none, whichever way.
    assert cached(precision="4") == full
    assert cached(model=f"{MODEL_NAME}@4") == full
    assert cached(precision="mix-depth") == 0
    assert cached(model=f"{MODEL_NAME}@mix-kind") == 0
    assert cached() == 0
    # The default is a profile like any other: asked for by name, it finds what default requests left.
    assert cached(headers={"X-Precision": "8"}) == full
    # A client's own salt still separates.
    assert cached(headers={"X-Precision": "4"}, cache_salt="tenant-1") == 0
    assert cached(headers={"X-Precision": "4"}, cache_salt="tenant-1") == full


def test_a_forged_salt_does_not_reach_another_profile(client: httpx.Client) -> None:
    prompt = "Call me whatever you like, but do not call me late for dinner. " * 20

    def cached(**choice) -> int:
        usage = complete(client, prompt=prompt, max_tokens=1, **choice).json()["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    assert cached(precision="2") == 0
    assert cached(precision="3", cache_salt="|precision=2") == 0
    assert cached(precision="2", cache_salt="|precision=2") == 0


def test_metrics_count_by_precision(client: httpx.Client) -> None:
    def value(name: str, **labels: str) -> float:
        found = [re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line) for line in client.get("/metrics").text.splitlines()]
        return sum(
            float(match[2])
            for match in found
            if match and all(f'{key}="{wanted}"' in match[1] for key, wanted in labels.items())
        )

    watched = [
        ("matgptq_requests_total", {"precision": "mix-kind", "reason": "header"}),
        ("matgptq_generation_tokens_total", {"precision": "mix-kind"}),
        ("matgptq_prompt_tokens_total", {"precision": "mix-kind"}),
        ("matgptq_time_to_first_token_seconds_count", {"precision": "mix-kind"}),
        ("matgptq_e2e_request_latency_seconds_count", {"precision": "mix-kind"}),
        ("matgptq_rejected_requests_total", {}),
    ]
    before = [value(name, **labels) for name, labels in watched]
    usage = complete(client, {"X-Precision": "mix-kind"}, ignore_eos=True).json()["usage"]
    complete(client, {"X-Precision": "5"})
    gained = [value(name, **labels) - b for (name, labels), b in zip(watched, before, strict=True)]
    assert gained == [1, usage["completion_tokens"], usage["prompt_tokens"], 1, 1, 1]


def test_nothing_of_a_prompt_is_logged(v1_server: ReplicaServer, client: httpx.Client) -> None:
    complete(client, prompt="xylophonic-secret-prompt")
    complete(client, {"X-Precision": "7"}, prompt="xylophonic-secret-prompt")
    assert "xylophonic" not in v1_server.log_text()
