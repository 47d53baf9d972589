"""Real clients against a real server with tenants, an SLO and a learned latency model: the official openai package,
LangChain's, and curl. Each uses every feature; then what the server shows, counts, logs and lets go of afterwards."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as LangChainOpenAI
from openai import AuthenticationError, NotFoundError, OpenAI, PermissionDeniedError, RateLimitError

from serve.api_keys import digest_of

from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

PROMPT = "The captain of the ship was"
SECRET = "xylophonic"
"""A word of every prompt, which may be found nowhere."""

RESEARCH = "matgptq-research-key-0123456789"
LIMITED = "matgptq-limited-key-0123456789"
LATER = "matgptq-later-key-0123456789"
ADMIN = "matgptq-admin-key-0123456789"

IMPOSSIBLE = {"X-Latency-Budget-Ms": "0.01", "X-Precision-Policy": "strict"}
EASY = {"X-Latency-Budget-Ms": "5000", "X-TTFT-Budget-Ms": "60000"}


def tenant_file(*more: str) -> str:
    return "\n".join(
        [
            "tenants:",
            "  research:",
            f'    keys: ["{digest_of(RESEARCH)}"]',
            "  limited:",
            f'    keys: ["{digest_of(LIMITED)}"]',
            "    default_precision: 4",
            "    allowed_precisions: [3, 4]",
            "    max_concurrent_requests: 1",
            *more,
            "",
        ]
    )


@dataclass
class Site:
    """The server and its tenant file."""

    server: ReplicaServer
    tenants: Path

    @property
    def url(self) -> str:
        return self.server.url

    def shown(self) -> dict[str, Any]:
        """GET /v1/precisions."""
        return httpx.get(f"{self.url}/v1/precisions", headers={"Authorization": f"Bearer {RESEARCH}"}).json()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the series of /metrics that have these labels."""
        found = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                found += float(match[2])
        return found

    def log(self) -> list[dict[str, Any]]:
        """The request log so far."""
        return [json.loads(line) for line in self.server.log_text().splitlines() if line.startswith('{"time"')]

    def is_idle(self) -> bool:
        load = self.shown()["load"]
        return load["running"] == {} and load["waiting"] == 0 and self.metric("vllm:num_requests_running") == 0


@pytest.fixture(scope="module")
def site(profiled_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("clients")
    tenants = folder / "tenants.yaml"
    tenants.write_text(tenant_file())
    arguments = ["--tenants", str(tenants), "--tpot-slo-ms", "50", "--auto-floor", "3", "--sweep-seconds", "2", "--request-log"]
    environment = {"MATGPTQ_ADMIN_KEY": ADMIN, "MATGPTQ_LATENCY_CACHE": str(folder / "cache")}
    with ReplicaServer(profiled_parent, folder / "server.log", arguments, environment=environment) as server:
        yield Site(server, tenants)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` becomes true in time."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.1)
    return True


# The official package


def openai(site: Site, key: str = RESEARCH) -> OpenAI:
    return OpenAI(base_url=f"{site.url}/v1", api_key=key, max_retries=0, timeout=120)


def completion(site: Site, key: str = RESEARCH, model: str = MODEL_NAME, **options: Any) -> tuple[str, str, str]:
    """(precision, reason, text) of a completion by the openai package."""
    options = {"prompt": f"{SECRET} {PROMPT}", "max_tokens": 6, "temperature": 0, **options}
    raw = openai(site, key).completions.with_raw_response.create(model=model, **options)
    return raw.headers["X-Precision"], raw.headers["X-Precision-Reason"], raw.parse().choices[0].text


def test_openai_chooses_by_header_body_and_alias(site: Site) -> None:
    answers = [
        completion(site, extra_headers={"X-Precision": "4"}),
        completion(site, extra_body={"precision": 4}),
        completion(site, model=f"{MODEL_NAME}@4"),
    ]
    assert [answer[:2] for answer in answers] == [("4", "header"), ("4", "body"), ("4", "model")]
    assert len({text for *_, text in answers}) == 1
    assert completion(site)[:2] == ("8", "default")
    assert completion(site, extra_body={"precision": "mix-kind"})[0] == "mix-kind"


def test_openai_asks_for_budgets(site: Site) -> None:
    precision, reason, _ = completion(site, extra_headers=EASY)
    assert reason == "budget"
    assert precision in ("8", "6", "mix-kind", "mix-depth", "4", "3")
    # None can: the narrowest above the floor.
    assert completion(site, extra_headers={"X-Latency-Budget-Ms": "0.01"})[:2] == ("3", "best-effort")
    assert completion(site, extra_headers={"X-TTFT-Budget-Ms": "0.01"})[:2] == ("3", "best-effort")
    # A budget does not change a precision that was asked for.
    assert completion(site, extra_headers=IMPOSSIBLE, model=f"{MODEL_NAME}@6")[:2] == ("6", "model")


def test_openai_raises_its_own_errors(site: Site) -> None:
    with pytest.raises(RateLimitError) as strict:
        completion(site, extra_headers=IMPOSSIBLE)
    assert int(strict.value.response.headers["Retry-After"]) >= 1
    assert strict.value.type == "RateLimitError"
    with pytest.raises(AuthenticationError):
        completion(site, "matgptq-not-a-key-0123456789")
    with pytest.raises(PermissionDeniedError, match="3, 4, auto"):
        completion(site, LIMITED, model=f"{MODEL_NAME}@8")
    with pytest.raises(NotFoundError, match=f"{MODEL_NAME}@4"):
        completion(site, model=f"{MODEL_NAME}@5")


def test_openai_uses_a_tenants_default(site: Site) -> None:
    assert completion(site, LIMITED)[:2] == ("4", "tenant")
    assert completion(site, LIMITED, extra_headers=EASY)[0] in ("3", "4")


def test_openai_streams_chat(site: Site) -> None:
    messages = [{"role": "user", "content": f"{SECRET} {PROMPT}"}]
    raw = openai(site).chat.completions.with_raw_response.create(
        model=f"{MODEL_NAME}@3", messages=messages, max_tokens=8, temperature=0, stream=True
    )
    assert raw.headers["X-Precision"] == "3"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    whole = openai(site).chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=8, temperature=0, extra_body={"precision": "3"}
    )
    assert streamed == whole.choices[0].message.content


# LangChain


def chat(site: Site, key: str = RESEARCH, model: str = MODEL_NAME, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{site.url}/v1",
        api_key=key,
        model=model,
        temperature=0,
        max_tokens=8,
        max_retries=0,
        include_response_headers=True,
        **options,
    )


def chosen(message: Any) -> tuple[str, str]:
    headers = {name.lower(): value for name, value in message.response_metadata["headers"].items()}
    return headers["x-precision"], headers["x-precision-reason"]


def test_langchain_chat_chooses_by_header_body_and_alias(site: Site) -> None:
    prompt = f"{SECRET} {PROMPT}"
    answers = [
        chat(site, default_headers={"X-Precision": "4"}).invoke(prompt),
        chat(site, extra_body={"precision": "4"}).invoke(prompt),
        chat(site, model=f"{MODEL_NAME}@4").invoke(prompt),
        chat(site).bind(extra_headers={"X-Precision": "4"}).invoke(prompt),
    ]
    assert [chosen(answer) for answer in answers] == [("4", "header"), ("4", "body"), ("4", "model"), ("4", "header")]
    assert len({answer.content for answer in answers}) == 1


def test_langchain_chat_streams(site: Site) -> None:
    model = chat(site, default_headers={"X-Precision": "3"}, streaming=True)
    pieces = list(model.stream(f"{SECRET} {PROMPT}"))
    assert chosen(pieces[0]) == ("3", "header")
    text = "".join(str(piece.content) for piece in pieces)
    assert text == chat(site, model=f"{MODEL_NAME}@3").invoke(f"{SECRET} {PROMPT}").content


def test_langchain_chat_asks_for_budgets_and_raises_openais_errors(site: Site) -> None:
    assert chosen(chat(site, default_headers=EASY).invoke(SECRET))[1] == "budget"
    assert chosen(chat(site, default_headers={"X-Latency-Budget-Ms": "0.01"}).invoke(SECRET)) == ("3", "best-effort")
    assert chosen(chat(site, LIMITED).invoke(SECRET)) == ("4", "tenant")
    with pytest.raises(RateLimitError) as strict:
        chat(site, default_headers=IMPOSSIBLE).invoke(SECRET)
    assert int(strict.value.response.headers["Retry-After"]) >= 1
    with pytest.raises(PermissionDeniedError):
        chat(site, LIMITED, extra_body={"precision": 8}).invoke(SECRET)
    with pytest.raises(AuthenticationError):
        chat(site, "matgptq-not-a-key-0123456789").invoke(SECRET)


def test_langchain_completions_choose_too(site: Site) -> None:
    seen: list[tuple[str, str]] = []

    def note(response: httpx.Response) -> None:
        seen.append((response.headers["x-precision"], response.headers["x-precision-reason"]))

    def model(**options: Any) -> LangChainOpenAI:
        return LangChainOpenAI(
            base_url=f"{site.url}/v1",
            api_key=RESEARCH,
            temperature=0,
            max_tokens=6,
            max_retries=0,
            http_client=httpx.Client(event_hooks={"response": [note]}),
            **{"model": MODEL_NAME, **options},
        )

    prompt = f"{SECRET} {PROMPT}"
    whole = model(default_headers={"X-Precision": "4"}).invoke(prompt)
    assert model(extra_body={"precision": "4"}).invoke(prompt) == whole
    assert "".join(model(model=f"{MODEL_NAME}@4", streaming=True).stream(prompt)) == whole
    assert seen == [("4", "header"), ("4", "body"), ("4", "model")]


# curl


def body(**fields: Any) -> str:
    return json.dumps({"model": MODEL_NAME, "prompt": f"{SECRET} {PROMPT}", "max_tokens": 6, "temperature": 0, **fields})


def curl_command(site: Site, *arguments: str, path: str = "/v1/completions", key: str | None = RESEARCH) -> list[str]:
    program = shutil.which("curl")
    assert program, "these tests need curl"
    command = [program, "--silent", "--show-error", "--http1.1", "--max-time", "100", f"{site.url}{path}"]
    if key is not None:
        command += ["-H", f"Authorization: Bearer {key}"]
    return [*command, "-H", "Content-Type: application/json", *arguments]


def curl(site: Site, *arguments: str, stdin: str | None = None, **where: Any) -> tuple[int, dict[str, str], str]:
    """(status, headers, body) of the answer that curl shows."""
    command = curl_command(site, "--include", *arguments, **where)
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    head, _, text = done.stdout.partition("\n\n")
    while head.startswith("HTTP/1.1 100"):
        head, _, text = text.partition("\n\n")
    status, *lines = head.splitlines()
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), {name.lower(): value for name, value in headers.items()}, text


def test_curl_chooses_by_header_body_and_alias(site: Site) -> None:
    answers = [
        curl(site, "-H", "X-Precision: 4", "-d", body()),
        curl(site, "-d", body(precision=4)),
        curl(site, "-d", body(vllm_xargs={"precision": "4"})),
        curl(site, "-d", body(model=f"{MODEL_NAME}@4")),
        curl(site, "-H", f"X-API-Key: {LIMITED}", "-d", body(), key=None),
    ]
    assert [status for status, *_ in answers] == [200] * 5
    assert [headers["x-precision"] for _, headers, _ in answers] == ["4"] * 5
    reasons = [headers["x-precision-reason"] for _, headers, _ in answers]
    assert reasons == ["header", "body", "body", "model", "tenant"]
    assert len({json.loads(text)["choices"][0]["text"] for *_, text in answers}) == 1


def test_curl_asks_for_budgets(site: Site) -> None:
    _, headers, _ = curl(site, "-H", "X-Latency-Budget-Ms: 5000", "-H", "X-TTFT-Budget-Ms: 60000", "-d", body())
    assert headers["x-precision-reason"] == "budget"
    strict = ["-H", "X-Latency-Budget-Ms: 0.01", "-H", "X-Precision-Policy: strict"]
    status, headers, text = curl(site, *strict, "-d", body())
    assert (status, json.loads(text)["error"]["type"]) == (429, "RateLimitError")
    assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("arguments", "key", "status"),
    [
        ([], None, 401),
        ([], "matgptq-not-a-key-0123456789", 401),
        (["-H", "X-Precision: 8"], LIMITED, 403),
        (["-H", "X-Precision: 4", "-H", "X-Precision: 8"], RESEARCH, 400),
        (["-H", "X-Latency-Budget-Ms: 5", "-H", "x-latency-budget-ms: 50"], RESEARCH, 400),
        (["-H", "X-Latency-Budget-Ms: soon"], RESEARCH, 400),
    ],
)
def test_curl_is_told_what_is_wrong(site: Site, arguments: list[str], key: str | None, status: int) -> None:
    answer, _, text = curl(site, *arguments, "-d", body(), key=key)
    assert (answer, json.loads(text)["error"]["code"]) == (status, status)
    assert SECRET not in text
    assert key is None or key not in text


def test_curl_sends_a_body_in_chunks(site: Site) -> None:
    chunked = ["-H", "Transfer-Encoding: chunked", "--data-binary", "@-"]
    status, headers, text = curl(site, *chunked, stdin=body(precision=3, prompt=PROMPT * 50))
    assert (status, headers["x-precision"]) == (200, "3"), text


def test_curl_reads_a_stream(site: Site) -> None:
    status, headers, text = curl(site, "-N", "-H", "X-Precision: 2", "-d", body(stream=True, max_tokens=12, ignore_eos=True))
    assert (status, headers["x-precision"]) == (200, "2")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert len(events) > 3


def test_the_slot_of_a_client_that_goes_away_is_free(site: Site) -> None:
    assert within(10, site.is_idle)
    gone = site.metric("matgptq_requests_total", status="499", precision="4")
    stream = body(stream=True, max_tokens=900, ignore_eos=True)
    command = curl_command(site, "-N", "-d", stream, key=LIMITED)
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"data: ")
        assert site.shown()["load"]["running"] == {"4": 1}
        # The one request that this tenant may have at a time.
        status, headers, _ = curl(site, "-d", body(), key=LIMITED)
        assert (status, headers["retry-after"]) == (429, "1")
    finally:
        client.kill()
        client.communicate()
    assert within(5, site.is_idle)
    assert site.metric("matgptq_requests_total", status="499", precision="4") == gone + 1
    assert curl(site, "-d", body(), key=LIMITED)[0] == 200


# A client that sends its body slowly


def slow_request(site: Site, key: str) -> tuple[socket.socket, bytes]:
    """A connection whose request is under way, and what is still to be sent."""
    host, port = site.url.removeprefix("http://").split(":")
    content = body().encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(head.encode())
    for byte in content[:20]:
        connection.sendall(bytes([byte]))
        time.sleep(0.01)
    return connection, content[20:]


def test_a_body_that_trickles_in_holds_no_slot(site: Site) -> None:
    assert within(10, site.is_idle)
    connection, rest = slow_request(site, LIMITED)
    with connection:
        assert site.is_idle()
        # This tenant may have one request at a time; the unfinished one is none yet.
        assert curl(site, "-d", body(), key=LIMITED)[0] == 200
        connection.sendall(rest)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"x-precision: 4\r\n" in answer


def test_a_client_that_goes_away_while_it_sends_leaves_nothing(site: Site) -> None:
    logged = len(site.log())
    for _ in range(3):
        slow_request(site, LIMITED)[0].close()
    assert within(5, site.is_idle)
    assert len(site.log()) == logged
    assert curl(site, "-d", body(), key=LIMITED)[0] == 200


# What the server shows, and who may change it


def test_precisions_shows_load_learned_times_and_decisions(site: Site) -> None:
    completion(site, extra_headers={"X-Latency-Budget-Ms": "4321"})
    shown = site.shown()
    assert shown["latency_model"]["source"] == "sweep"
    assert shown["latency_model"]["observations"] > 0
    for entry in shown["data"]:
        assert all(0 < entry["step_ms"][batch] < 10_000 for batch in ("1", "8", "32"))
    assert shown["load"].keys() == {"running", "waiting", "context_tokens", "kv_cache_usage"}
    decision = shown["decisions"][-1]
    assert decision["budget_tpot_ms"] == 4321
    assert decision["reason"] == "budget"
    assert decision["predicted_tpot_ms"] > 0
    assert abs(decision["time"] - time.time()) < 60


def test_only_the_admin_key_changes_the_slo(site: Site) -> None:
    def put(slo: dict[str, Any], *headers: str) -> tuple[int, dict[str, Any]]:
        named = [part for header in headers for part in ("-H", header)]
        status, _, text = curl(site, "-X", "PUT", *named, "-d", json.dumps(slo), path="/v1/slo", key=None)
        return status, json.loads(text)

    before = {"tpot_ms": 50, "ttft_ms": None, "auto_floor": "3"}
    assert site.shown()["slo"] == before
    wanted = {"tpot_ms": 70.5, "ttft_ms": 900, "auto_floor": "4"}
    for headers in ([], [f"Authorization: Bearer {RESEARCH}"], ["X-API-Key;"], [f"X-API-Key: {ADMIN}x"]):
        status, answer = put(wanted, *headers)
        assert (status, answer["error"]["type"]) == (403, "PermissionDeniedError")
    assert site.shown()["slo"] == before
    try:
        assert put(wanted, f"Authorization: Bearer {ADMIN}") == (200, wanted)
        assert site.shown()["slo"] == wanted
        assert completion(site, extra_headers={"X-Latency-Budget-Ms": "0.01"})[:2] == ("4", "best-effort")
        for wrong in ({"auto_floor": "5"}, {"tpot_ms": -1}, {"tpot": 1}):
            assert put(wrong, f"Authorization: Bearer {ADMIN}")[0] == 400
        assert site.shown()["slo"] == wanted
    finally:
        # Beside a tenant's key, the admin key goes into the other header.
        assert put(before, f"Authorization: Bearer {RESEARCH}", f"X-API-Key: {ADMIN}") == (200, before)


@pytest.mark.parametrize("path", ["/generative_scoring", "/v1/systemone", "/inference/v1/generate"])
def test_tenants_have_no_way_around_precisions_and_quotas(site: Site, path: str) -> None:
    assert curl(site, "-d", "{}", path=path)[0] == 403


def test_metrics_count_tenants_and_budgets(site: Site) -> None:
    def counted() -> list[float]:
        return [
            site.metric("matgptq_tenant_requests_total", tenant="limited", precision="3"),
            site.metric("matgptq_tenant_generation_tokens_total", tenant="limited", precision="3"),
            site.metric("matgptq_budget_outcomes_total", precision="3", budget="tpot", outcome="met"),
            site.metric("matgptq_prediction_ratio_count", budget="tpot"),
            site.metric("matgptq_tenant_rejected_requests_total", tenant="limited", reason="tenant"),
            site.metric("matgptq_tenant_rejected_requests_total", tenant="limited", reason="budget_unmet"),
        ]

    before = counted()
    completion(
        site, LIMITED, extra_headers={"X-Precision": "3", "X-Latency-Budget-Ms": "5000"}, extra_body={"ignore_eos": True}
    )
    completion(site, LIMITED, extra_headers=EASY, extra_body={"ignore_eos": True})
    for options in ({"X-Precision": "8"}, IMPOSSIBLE):
        with pytest.raises((PermissionDeniedError, RateLimitError)):
            completion(site, LIMITED, extra_headers=options)
    # The engine's word about a sequence may come after its answer.
    assert within(5, lambda: counted()[3] > before[3])
    gained = [after - b for after, b in zip(counted(), before, strict=True)]
    assert gained[0] >= 1
    assert gained[1] >= 6
    assert gained[2] >= 1
    assert gained[3:] == [1, 1, 1]
    assert site.metric("matgptq_latency_model_error_ratio") >= 0


def test_a_new_tenant_file_is_in_force_within_three_seconds(site: Site) -> None:
    def works() -> bool:
        return curl(site, "-d", body(max_tokens=1), key=LATER)[0] == 200

    def replace(text: str) -> None:
        new = site.tenants.with_suffix(".new")
        new.write_text(text)
        new.rename(site.tenants)

    assert not works()
    replace(tenant_file("  later:", f'    keys: ["{digest_of(LATER)}"]'))
    assert within(3, works)
    # A wrong file changes nothing.
    replace("tenants: {later: [")
    time.sleep(2)
    assert works()
    assert "stay in force" in site.server.log_text()
    replace(tenant_file())
    assert within(3, lambda: not works())
    assert curl(site, "-d", body(max_tokens=1))[0] == 200


def test_the_request_log_has_the_request_and_neither_key_nor_prompt(site: Site) -> None:
    status, *_ = curl(site, "-H", "X-Request-Id: find-me", "-H", "X-Latency-Budget-Ms: 4000", "-d", body(max_tokens=3))
    assert status == 200
    refused, *_ = curl(site, "-H", "X-Request-Id: find-it", "-H", "X-Precision: 8", "-d", body(), key=LIMITED)
    assert refused == 403
    assert within(3, lambda: {"find-me", "find-it"} <= {entry["request_id"] for entry in site.log()})
    by_id = {entry["request_id"]: entry for entry in site.log()}
    served, rejected = by_id["find-me"], by_id["find-it"]
    assert (served["status"], served["tenant"], served["reason"]) == (200, "research", "budget")
    assert (served["path"], served["budget_tpot_ms"]) == ("/v1/completions", 4000)
    assert served["predicted_tpot_ms"] > 0
    assert served["duration_s"] > 0
    assert (rejected["status"], rejected["rejection"], rejected["tenant"]) == (403, "tenant", "limited")
    # Of everything that this module sent.
    log = site.server.log_text()
    for secret in (SECRET, RESEARCH, LIMITED, LATER, ADMIN, "not-a-key"):
        assert secret not in log
