"""The middleware between an ASGI server and an application that records what it receives."""

import asyncio
import itertools
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.middleware import GENERATION_PATHS
from serve.settings import Settings

OFFER = "2, 3, 4, 6, 8, mix-3.0, auto"


@pytest.mark.parametrize("path", sorted(GENERATION_PATHS))
def test_the_chosen_profile_reaches_vllm_and_the_client(harness, path):
    answer = harness.call({"prompt": "hello", "vllm_xargs": {"other": 1}}, [(b"x-precision", b"4")], path)
    assert answer.status == 200
    assert answer.headers["x-precision"] == "4"
    assert answer.headers["x-precision-reason"] == "header"
    assert harness.inner.json["vllm_xargs"] == {"other": 1, "precision": "4"}
    assert harness.inner.json["prompt"] == "hello"


@pytest.mark.parametrize(
    ("body", "headers", "profile", "reason"),
    [
        ({}, [], "8", "default"),
        ({"model": "tiny"}, [], "8", "default"),
        ({"model": "tiny@3"}, [], "3", "model"),
        ({"precision": 4, "model": "tiny@3"}, [], "4", "body"),
        ({"vllm_xargs": {"precision": "mix-3.0"}, "model": "tiny@3"}, [], "mix-3.0", "body"),
        ({"vllm_xargs": None, "precision": None}, [], "8", "default"),
        ({"precision": 4, "vllm_xargs": {"precision": "4"}}, [(b"x-precision", b"2")], "2", "header"),
        ({"precision": "auto"}, [], "8", "auto"),
    ],
)
def test_each_selector_is_honoured_and_removed_where_vllm_does_not_know_it(harness, body, headers, profile, reason):
    answer = harness.call(body, headers)
    assert (answer.headers["x-precision"], answer.headers["x-precision-reason"]) == (profile, reason)
    assert harness.inner.json["vllm_xargs"] == {"precision": profile}
    assert "precision" not in harness.inner.json
    assert harness.inner.json.get("model") == ("tiny" if "model" in body else None)
    assert harness.count("matgptq_requests_total", precision=profile, reason=reason, status="200") == 1


@pytest.mark.parametrize(
    ("salt", "rewritten"),
    [({}, "precision=3"), ({"cache_salt": None}, "precision=3"), ({"cache_salt": "precision=8"}, "precision=3|precision=8")],
)
def test_beams_which_get_no_xargs_get_the_profile_in_the_salt(harness, salt, rewritten):
    harness.call({"use_beam_search": True, "precision": 3, **salt})
    assert harness.inner.json["cache_salt"] == rewritten
    harness.call({"use_beam_search": False, "precision": 3, **salt})
    assert harness.inner.json.get("cache_salt") == salt.get("cache_salt")


@pytest.mark.parametrize("salt", [7, ["precision=8"]])
def test_a_salt_of_the_wrong_type_is_vllms_to_refuse(harness, salt):
    harness.call({"use_beam_search": True, "precision": 3, "cache_salt": salt})
    assert harness.inner.json["cache_salt"] == salt


def test_content_length_is_that_of_the_rewritten_body_and_chunked_encoding_is_gone(harness):
    harness.call(b'{"prompt":"x"}', [(b"Transfer-Encoding", b"chunked")], content_length=False)
    assert harness.inner.headers["content-length"] == str(len(harness.inner.bodies[0]))
    assert "transfer-encoding" not in harness.inner.headers
    harness.call(b'{"precision": "4"}')
    lengths = [value for name, value in harness.inner.scopes[-1]["headers"] if name == b"content-length"]
    assert lengths == [str(len(harness.inner.bodies[-1])).encode()]


@given(st.lists(st.integers(1, 40), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_body_in_any_chunks_is_one_body(make_harness, cuts):
    harness = make_harness()
    body = '{"prompt": "grüße, 世界", "precision": 3}'.encode()
    positions = sorted({0, *[cut for cut in cuts if cut < len(body)], len(body)})
    chunks = [body[a:b] for a, b in itertools.pairwise(positions)]
    answer = harness.call([*chunks, b""], content_length=False)
    assert answer.headers["x-precision"] == "3"
    assert harness.inner.json == {"vllm_xargs": {"precision": "3"}, "prompt": "grüße, 世界"}


def test_a_streamed_answer_passes_chunk_by_chunk(harness):
    assert harness.call().chunks == [b"one", b"two"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "param", "rejection"),
    [
        (b'{"precision": 5}', [], 400, "precision", "precision"),
        (b'{"precision": {}}', [], 400, "precision", "precision"),
        (b"{}", [(b"x-precision", b"7")], 400, "X-Precision", "precision"),
        (b"{}", [(b"x-precision", b"")], 400, "X-Precision", "header"),
        (b"{}", [(b"x-precision", b"4, 8")], 400, "X-Precision", "header"),
        (b'{"precision": 4, "vllm_xargs": {"precision": "8"}}', [], 400, "precision", "precision"),
        (b'{"vllm_xargs": {"precision": [4]}}', [], 400, "vllm_xargs.precision", "precision"),
        (b'{"model": "tiny@5"}', [], 404, "model", "model"),
    ],
)
def test_a_refusal_has_openais_shape_lists_the_offer_and_never_reaches_vllm(harness, body, headers, status, param, rejection):
    answer = harness.call(body, headers)
    assert answer.status == status
    assert answer.error.keys() == {"message", "type", "param", "code"}
    assert (answer.error["code"], answer.error["param"]) == (status, param)
    assert answer.error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")
    offer = re.sub(r"(\w[\w.-]*)", r"tiny@\1", OFFER) if status == 404 else OFFER
    assert offer in answer.error["message"]
    assert harness.inner.scopes == []
    assert harness.count("matgptq_rejected_requests_total", reason=rejection) == 1
    assert len(harness.joined) == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b'"secret prompt"', None),
        (b'{"prompt": "secret prompt"', None),
        (b'{"prompt": "secret prompt" \xff}', None),
        (b"\xff\xfe{\x00}\x00", None),
        (b"a=secret+prompt&b=1", None),
        (b'{"precision":4,"precision":4}', "precision"),
        (b'{"precision":4,"pr\\u0065cision":8}', "precision"),
        (b'{"model":"a","model":"b"}', "model"),
        (b'{"vllm_xargs":{},"vllm_xargs":{"precision":"8"}}', "vllm_xargs"),
        (b'{"vllm_xargs":{"precision":"4","precision":"8"}}', "vllm_xargs.precision"),
        (b'{"vllm_xargs":"precision"}', "vllm_xargs"),
        (b'{"vllm_xargs":[1]}', "vllm_xargs"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"a":' + b"9" * 10_000 + b"}", None),
    ],
)
def test_a_body_that_two_parsers_could_read_differently_is_refused(harness, body, param):
    answer = harness.call(body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert "secret" not in answer.error["message"]
    assert harness.inner.scopes == []


@pytest.mark.parametrize("headers", [[(b"x-precision", b"4"), (b"X-Precision", b"4")], [(b"x-precision", b"\xff4")]])
def test_duplicate_and_undecodable_headers_are_refused(harness, headers):
    answer = harness.call(b"{}", headers)
    assert (answer.status, answer.error["param"]) == (400, "X-Precision")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not(make_harness, announced):
    harness = make_harness(Settings(max_body_bytes=64))
    fitting = b'{"prompt":"' + b"x" * 51 + b'"}'
    body = fitting + b" "
    assert len(fitting) == 64
    assert harness.call([fitting[:30], fitting[30:]], content_length=announced).status == 200
    answer = harness.call([body[:60], body[60:]], content_length=announced)
    assert (answer.status, answer.error["type"]) == (413, "RequestEntityTooLargeError")
    assert "64 bytes" in answer.error["message"]
    assert len(harness.inner.scopes) == 1
    assert harness.count("matgptq_rejected_requests_total", reason="too_large") == 1


def test_an_announced_body_over_the_limit_is_refused_before_it_is_read(make_harness):
    harness = make_harness(Settings(max_body_bytes=64))
    answer = harness.call(b"{}", [(b"content-length", b"9" * 40)], content_length=False, disconnect_after=0)
    assert answer.status == 413


def test_headers_over_the_limit_are_refused(make_harness):
    harness = make_harness(Settings(max_header_bytes=1000))
    assert harness.call(b"{}", [(b"cookie", b"x" * 900)]).status == 200
    assert harness.call(b"{}", [(b"cookie", b"x" * 500)] * 2).status == 431


@pytest.mark.parametrize("chunks_before", [0, 1])
def test_a_client_that_goes_away_while_it_sends_its_body_costs_nothing(harness, chunks_before):
    answer = harness.call([b'{"prompt":', b'"x"}'], disconnect_after=chunks_before)
    assert answer.status == 0
    assert harness.inner.scopes == []
    assert len(harness.joined) == 0


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/completions", "GET"),
        ("/v1/models", "POST"),
        ("/health", "POST"),
        ("/v1/completions/render", "POST"),
        ("/v1/chat/completions/", "POST"),
        ("/other/v1/completions", "POST"),
    ],
)
def test_everything_else_passes_untouched(harness, path, method):
    body = b"not json \xff"
    answer = harness.call(body, [(b"x-precision", b"nonsense!")], path, method)
    assert answer.status == 200
    assert "x-precision" not in answer.headers
    assert harness.inner.bodies == [body]


@pytest.mark.parametrize("scope_type", ["websocket", "lifespan"])
def test_what_is_not_http_passes_untouched(harness, scope_type):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    harness.app.app = app
    scope = {"type": scope_type, "path": "/v1/completions"}
    asyncio.run(harness.app(scope, None, None))
    assert seen == [scope]


def test_a_mounted_server_recognizes_its_paths_below_the_mount(harness):
    answer = harness.call({"precision": 2}, path="/api/v1/completions", root_path="/api")
    assert answer.headers["x-precision"] == "2"
    answer = harness.call({"precision": 2}, path="/apiv1/completions", root_path="/api")
    assert "x-precision" not in answer.headers


def test_errors_of_vllm_carry_the_selection_too(harness):
    harness.inner.status = 404
    answer = harness.call({"precision": 6})
    assert (answer.status, answer.headers["x-precision"]) == (404, "6")
    assert harness.count("matgptq_requests_total", precision="6", reason="body", status="404") == 1


def test_a_response_header_that_vllm_might_set_is_replaced_not_doubled(harness):
    async def behaviour(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-precision", b"9"), (b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    harness.inner.behaviour = behaviour
    assert harness.call().headers == {"x-precision": "8", "a": "b", "x-precision-reason": "default"}


def test_a_disconnect_during_the_answer_reaches_vllm_and_is_counted(harness):
    async def behaviour(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    harness.inner.behaviour = behaviour
    harness.call()
    assert harness.count("matgptq_requests_total", precision="8", reason="default", status="499") == 1
    assert not harness.joined.in_flight


def test_a_failure_inside_is_passed_on_and_counted(harness):
    async def behaviour(scope, receive, send):
        raise RuntimeError("inside")

    harness.inner.behaviour = behaviour
    with pytest.raises(RuntimeError, match="inside"):
        harness.call()
    assert harness.count("matgptq_requests_total", precision="8", reason="default", status="500") == 1
    assert not harness.joined.in_flight


def test_a_cancelled_request_is_counted_as_gone(harness):
    async def behaviour(scope, receive, send):
        await receive()
        raise asyncio.CancelledError

    harness.inner.behaviour = behaviour
    with pytest.raises(asyncio.CancelledError):
        harness.call()
    assert harness.count("matgptq_requests_total", precision="8", reason="default", status="499") == 1


def test_the_precision_is_known_by_request_id_while_vllm_works(harness):
    seen = {}

    async def behaviour(scope, receive, send):
        headers = {name.lower(): value for name, value in scope["headers"]}
        body = json.loads(harness.inner.bodies[-1])
        base = body.get("request_id") or headers[b"x-request-id"].decode()
        seen[scope["path"]] = harness.joined.precision_of(base), base
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    harness.inner.behaviour = behaviour
    for path in sorted(GENERATION_PATHS):
        harness.call({"precision": 4}, path=path)
        assert seen[path][0] == "4"
    harness.call({"precision": 3}, [(b"X-Request-Id", b"mine")])
    assert seen["/v1/completions"] == ("3", "mine")
    harness.call({"precision": 6, "request_id": "body-id"}, path="/v1/responses")
    assert seen["/v1/responses"] == ("6", "body-id")
    assert not harness.joined.in_flight


def test_without_a_replica_requests_pass_but_a_header_is_refused(harness):
    harness.control = None
    answer = harness.call(b"anything")
    assert (answer.status, harness.inner.bodies) == (200, [b"anything"])
    assert "x-precision" not in answer.headers
    answer = harness.call(b"{}", [(b"x-precision", b"4")])
    assert (answer.status, answer.error["param"]) == (400, "X-Precision")


@given(st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_body_gives_an_answer_and_never_an_exception(make_harness, body):
    harness = make_harness()
    answer = harness.call(body)
    assert answer.status in (200, 400, 404)
    assert (answer.status == 200) == bool(harness.inner.bodies)


@given(
    st.lists(
        st.tuples(st.sampled_from([b"x-precision", b"X-Request-Id", b"content-length", b"a"]), st.binary(max_size=12)),
        max_size=4,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_headers_give_an_answer_and_never_an_exception(make_harness, headers):
    answer = make_harness().call(b"{}", headers, content_length=False)
    assert answer.status in (200, 400, 413)
