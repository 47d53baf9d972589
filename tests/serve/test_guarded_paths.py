"""Where there are tenants: which paths need a key, and that there is no way around precisions and quotas."""

import asyncio
import json
from pathlib import Path

import pytest

from serve.api_keys import digest_of
from serve.middleware import GENERATION_PATHS, GUARDED_PREFIXES, PRECISIONS_PATH, SLO_PATH, UNMETERED_PATHS, admin_keys, api_key
from serve.tenant_reload import TenantReload

KEY = "sk-0123456789abcdef"
BEARER = (b"authorization", b"Bearer " + KEY.encode())


@pytest.fixture
def guarded(make_harness, tmp_path: Path):
    file = tmp_path / "tenants.yaml"
    file.write_text(f'tenants:\n  one: {{keys: ["{digest_of(KEY)}"], allowed_precisions: [4], default_precision: 4}}\n')
    return make_harness(tenants=TenantReload(file, interval_s=None))


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/precisions/x", "/v2/embed", "/inference/v1/abort_requests", "/cohere/v2/x"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_what_vllm_guards_with_its_api_key_needs_a_tenants_key(guarded, path, method):
    assert path.startswith(GUARDED_PREFIXES)
    assert guarded.call(path=path, method=method).status == 401
    assert guarded.call(path=path, method=method, headers=[BEARER]).status == 200


@pytest.mark.parametrize("path", sorted(GENERATION_PATHS))
def test_every_generation_path_needs_one(guarded, path):
    answer = guarded.call(path=path)
    assert (answer.status, answer.error["type"]) == (401, "AuthenticationError")
    assert guarded.call(path=path, headers=[BEARER]).status == 200


@pytest.mark.parametrize(("path", "method"), [("/health", "GET"), ("/playground", "GET"), ("/v1/completions", "OPTIONS")])
def test_the_rest_and_preflights_pass(guarded, path, method):
    assert guarded.call(path=path, method=method).status == 200


@pytest.mark.parametrize("path", sorted(UNMETERED_PATHS))
def test_what_computes_without_precision_and_quota_is_closed(guarded, harness, path):
    answer = guarded.call(path=path, headers=[BEARER])
    assert (answer.status, answer.error["type"]) == (403, "PermissionDeniedError")
    assert guarded.inner.scopes == []
    assert guarded.call(path=path).status in (401, 403)
    # Without tenants there is nothing to go around.
    assert harness.call(path=path).status == 200


@pytest.mark.parametrize(("path", "closed"), [("/v1/realtime", True), ("/other", False)])
def test_websockets_are_closed_where_a_key_is_needed(guarded, harness, path, closed):
    def connect(to) -> list[dict]:
        sent: list[dict] = []

        async def app(scope, receive, send):
            await send({"type": "websocket.accept"})

        async def send(message):
            sent.append(message)

        to.app.app = app
        asyncio.run(to.app({"type": "websocket", "path": path, "headers": [BEARER]}, None, send))
        return sent

    assert connect(guarded) == ([{"type": "websocket.close", "code": 1008}] if closed else [{"type": "websocket.accept"}])
    assert connect(harness) == [{"type": "websocket.accept"}]


@pytest.mark.parametrize(("method", "path"), [("PUT", SLO_PATH), ("POST", PRECISIONS_PATH)])
def test_an_admin_request_is_left_to_the_endpoint_whose_key_is_no_tenants(guarded, method, path):
    assert guarded.call(path=path, method=method).status == 200
    assert guarded.call(path=path, method="GET").status == 401


@pytest.mark.parametrize(
    ("headers", "key", "admin"),
    [
        ([], None, []),
        ([(b"authorization", b"Bearer a")], "a", ["a"]),
        ([(b"Authorization", b"bearer a")], "a", ["a"]),
        ([(b"x-api-key", b"b")], "b", ["b"]),
        ([(b"authorization", b"Bearer a"), (b"x-api-key", b"b")], "a", ["a", "b"]),
        ([(b"authorization", b"Basic a"), (b"x-api-key", b"b")], None, ["b"]),
        ([(b"authorization", b"Bearer a"), (b"authorization", b"Bearer a")], None, []),
        ([(b"x-api-key", b"b"), (b"X-API-Key", b"b")], None, []),
        # An empty key is none: it must not equal a key that was set to nothing.
        ([(b"authorization", b"Bearer ")], None, []),
        ([(b"x-api-key", b" ")], None, []),
    ],
)
def test_a_key_is_one_header_of_a_kind(headers, key, admin):
    assert api_key(headers) == key
    assert admin_keys(headers) == admin


@pytest.mark.parametrize(
    ("body", "rejection", "status"),
    [(b"{", "body", 400), (b'{"precision": 5}', "precision", 400), (b'{"precision": 8}', "tenant", 403)],
)
def test_every_refusal_is_counted_and_logged_with_its_tenant(guarded, body, rejection, status, caplog):
    with caplog.at_level("INFO", logger="matgptq.requests"):
        assert guarded.call(body, [BEARER]).status == status
    assert guarded.count("matgptq_tenant_rejected_requests_total", tenant="one", reason=rejection) == 1
    [entry] = [json.loads(record.message) for record in caplog.records]
    assert (entry["tenant"], entry["rejection"], entry["status"]) == ("one", rejection, status)
    assert KEY not in caplog.text
