"""Our endpoints against what they declare: schemathesis makes requests, right and wrong ones, from the OpenAPI schema of the
application and compares every answer with it."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from serve.budget import Budget
from serve.control import parse_slo
from serve.endpoints import MAX_ADMIN_BYTES
from serve.errors import RequestError
from serve.playground.route import PLAYGROUND_PATH

from .test_endpoints import Engine, make_app

ADMIN = {"X-API-Key": "secret-of-the-admin"}
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MODES = pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)

PLAYGROUND_SCHEMA = {
    "openapi": "3.1.0",
    "info": {"title": "playground", "version": "1"},
    "paths": {PLAYGROUND_PATH: {"get": {"responses": {"200": {"description": "The page", "content": {"text/html": {}}}}}}},
}
"""The page is no part of the API: the application's own schema leaves it out."""


@pytest.fixture
def app(report: dict[str, Any]) -> FastAPI:
    return make_app(Engine([report]))[0]


def operation(app: FastAPI, path: str, method: str) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]


def statuses(
    tested: Any, mode: GenerationMode, headers: dict[str, str] | None = None, excluded: Sequence[Any] = ()
) -> set[int]:
    """The statuses of the answers to fuzzed requests, each of which was as declared.

    Args:
        excluded: of schemathesis' checks.
    """
    seen = set()

    @FUZZ
    @given(case=tested.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        seen.add(case.call_and_validate(headers=headers, excluded_checks=list(excluded)).status_code)

    check()
    return seen


def test_ready_is_as_declared(app: FastAPI) -> None:
    # This engine generates nothing; tests/serve/test_drain.py has the ones that do. Here a 503 is an answer, no fault.
    tested = operation(app, "/ready", "GET")
    assert statuses(tested, GenerationMode.POSITIVE, excluded=[not_a_server_error]) == {503}


@MODES
def test_precisions_is_as_declared(app: FastAPI, mode: GenerationMode) -> None:
    client = TestClient(app)
    client.put("/v1/slo", json={"tpot_ms": 0.01}, headers=ADMIN)
    for precision in ("auto", "4"):
        assert client.post("/v1/completions", json={"precision": precision}).status_code == 200
    assert len(client.get("/v1/precisions").json()["decisions"]) == 1
    tested = operation(app, "/v1/precisions", "GET")
    if mode is GenerationMode.NEGATIVE:
        # It has no parameter that could be wrong; a body or a query is ignored.
        assert tested.definition.raw.get("parameters") is None
    else:
        assert statuses(tested, mode) == {200}


def test_slo_takes_what_is_declared(app: FastAPI) -> None:
    # Which profiles are held is known after the schema is made: 400 for a well-formed name of another one.
    tested = operation(app, "/v1/slo", "PUT")
    assert statuses(tested, GenerationMode.POSITIVE, ADMIN, [positive_data_acceptance]) == {200, 400}
    client = TestClient(app)
    for floor in (None, "2", "3", "4", "6", "8", "mix-3.0", 4):
        answer = client.put("/v1/slo", json={"tpot_ms": 12.5, "auto_floor": floor}, headers=ADMIN)
        assert answer.json() == {"tpot_ms": 12.5, "ttft_ms": None, "auto_floor": None if floor is None else str(floor)}


def test_slo_refuses_everything_else(app: FastAPI) -> None:
    before = TestClient(app).get("/v1/precisions").json()["slo"]
    found = statuses(operation(app, "/v1/slo", "PUT"), GenerationMode.NEGATIVE, ADMIN)
    assert found >= {400}
    assert 200 not in found
    assert TestClient(app).get("/v1/precisions").json()["slo"] == before


@MODES
def test_slo_without_the_admin_key_is_refused(app: FastAPI, mode: GenerationMode) -> None:
    assert statuses(operation(app, "/v1/slo", "PUT"), mode, {"Authorization": "Bearer guess"}) <= {403, 405}


@pytest.mark.parametrize(("path", "method"), [("/v1/precisions", "GET"), ("/v1/slo", "PUT")])
def test_without_a_replica_the_documented_501_comes(path: str, method: str) -> None:
    tested = operation(make_app(None)[0], path, method)
    case = tested.Case(body={} if method == "PUT" else schemathesis.core.NOT_SET)
    response = case.call(headers=ADMIN)
    assert response.status_code == 501
    assert tested.is_valid_response(response)


def test_the_playground_is_as_described(app: FastAPI) -> None:
    schema = schemathesis.openapi.from_dict(PLAYGROUND_SCHEMA)
    schema.app = app
    assert statuses(schema[PLAYGROUND_PATH]["GET"], GenerationMode.POSITIVE) == {200}


def test_every_error_of_the_slo_is_declared_and_in_openais_shape(app: FastAPI) -> None:
    tested = operation(app, "/v1/slo", "PUT")
    client = TestClient(app)
    for content, headers, status in [
        (b"{", ADMIN, 400),
        (b"[" * MAX_ADMIN_BYTES, ADMIN, 400),
        (b"[" * (MAX_ADMIN_BYTES + 1), ADMIN, 413),
        (b"\xff", ADMIN, 400),
        (b'{"tpot_ms": NaN}', ADMIN, 400),
        (b'{"tpot_ms": 1e999}', ADMIN, 400),
        (b'{"auto_floor": {"a": []}}', ADMIN, 400),
        (b"{}", {}, 403),
        (b"{}", {"X-API-Key": ""}, 403),
        (b"{}", {"Authorization": "Bearer "}, 403),
    ]:
        answer = client.put("/v1/slo", content=content, headers=headers)
        assert answer.status_code == status, content
        assert answer.json()["error"]["code"] == status
        assert str(status) in tested.definition.raw["responses"]


@given(st.binary(max_size=80) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps).map(str.encode))
@FUZZ
def test_any_body_is_an_slo_or_refused(raw: bytes) -> None:
    with contextlib.suppress(RequestError):
        slo = parse_slo(raw)
        assert slo.budget is None or slo.budget != Budget()


def test_the_admin_key_may_stand_beside_a_key_of_the_server(app: FastAPI) -> None:
    client = TestClient(app)
    for headers in ({"Authorization": "Bearer secret-of-the-admin"}, {"Authorization": "Bearer server-key", **ADMIN}):
        assert client.put("/v1/slo", json={"tpot_ms": 9}, headers=headers).status_code == 200
