"""The request log: one line of JSON per request, and nothing in it that should not be."""

import asyncio
import io
import json
import logging

import pytest

from serve import request_log
from serve.admission import Admitted
from serve.errors import RequestError
from serve.exchange import Exchange
from serve.request_details import RequestDetails
from serve.request_ids import MAX_ID_CHARS
from serve.selection import Selection

DETAILS = RequestDetails("budget", "acme", 25.0, None, 21.04567, float("inf"))
FIELDS = [
    "time", "request_id", "path", "status", "rejection", "precision", "last_precision", "reason", "tenant",
    "budget_tpot_ms", "budget_ttft_ms",
    "predicted_tpot_ms", "predicted_ttft_ms", "duration_s", "time_to_first_byte_s", "streamed", "client_gone",
]  # fmt: skip
HEADERS = [(b"Authorization", b"Bearer secret-key"), (b"X-Request-Id", b"sent"), (b"cookie", b"secret-cookie")]


@pytest.fixture
def stream():
    """A log that is enabled, and off again afterwards."""
    stream = io.StringIO()
    handler = request_log.enable(stream)
    yield stream
    request_log.logger.removeHandler(handler)
    request_log.logger.setLevel(logging.WARNING)
    request_log.logger.propagate = True


def exchange(request_id: str | None = "mine", path: str = "/v1/completions", content_type: bytes = b"application/json"):
    """A request that was given a precision, and the answer to it as far as ``send`` is called."""

    async def nowhere(message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": path, "headers": HEADERS}
    selection = Selection("4", "budget")
    admitted = Admitted(selection, DETAILS, lambda status: None)
    made = Exchange(scope, nowhere, nowhere, b'{"prompt": "secret-prompt"}', selection, request_id, admitted)
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]}
    body = {"type": "http.response.body", "body": b"secret-answer", "more_body": True}
    end = {"type": "http.response.body", "body": b"", "more_body": False}
    return made, [start, body, end]


def answer(made: Exchange, messages) -> None:
    async def run() -> None:
        for message in messages:
            await made.send(message)

    asyncio.run(run())
    request_log.log_request(made)


def test_a_request_is_one_line_with_what_was_decided_and_how_it_went(stream):
    made, messages = exchange()
    answer(made, messages)
    assert stream.getvalue().count("\n") == 1
    line = json.loads(stream.getvalue())
    assert list(line) == FIELDS
    assert line["time"].endswith("Z")
    assert 0 <= line["time_to_first_byte_s"] <= line["duration_s"] < 60
    expected = {
        "request_id": "mine", "path": "/v1/completions", "status": 200, "rejection": None, "precision": "4",
        "reason": "budget", "tenant": "acme", "budget_tpot_ms": 25.0, "budget_ttft_ms": None, "predicted_tpot_ms": 21.0457,
        "predicted_ttft_ms": None, "streamed": False, "client_gone": False,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected


def test_streams_and_clients_that_went_away_are_told(stream):
    made, messages = exchange(content_type=b"text/event-stream; charset=utf-8")
    answer(made, messages[:-1])
    line = json.loads(stream.getvalue())
    assert (line["streamed"], line["client_gone"], line["status"]) == (True, True, 499)


def test_an_answer_that_never_began_has_no_first_byte(stream):
    made, _ = exchange()
    answer(made, [])
    assert json.loads(stream.getvalue())["time_to_first_byte_s"] is None


def test_neither_prompts_nor_keys_nor_other_headers_are_in_it(stream):
    made, messages = exchange()
    answer(made, messages)
    request_log.log_rejection(made.scope, RequestError("secret-message", "body"))
    assert stream.getvalue().count("\n") == 2
    assert "secret" not in stream.getvalue()


@pytest.mark.parametrize("evil", ["a\nb", 'a"}\r\n{"b', "\x1b[2J\x7f\x9b", "a\u2028b", "é", "\x00"])
def test_whatever_a_client_sends_stays_within_its_line(stream, evil):
    made, messages = exchange(request_id=evil, path=evil)
    answer(made, messages)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert text.isascii()
    assert json.loads(text)["request_id"] == json.loads(text)["path"] == evil


def test_names_are_bounded(stream):
    made, messages = exchange(request_id="i" * 10_000, path="/" * 10_000)
    answer(made, messages)
    line = json.loads(stream.getvalue())
    assert line["request_id"] == "i" * MAX_ID_CHARS + "..."
    assert line["path"] == "/" * request_log.MAX_PATH_CHARS + "..."


def test_a_refusal_is_logged_with_its_kind(stream):
    made, _ = exchange()
    request_log.log_rejection(made.scope, RequestError("too much", "quota", status=429), "acme")
    line = json.loads(stream.getvalue())
    assert list(line) == FIELDS
    shown = (line["status"], line["rejection"], line["tenant"], line["request_id"], line["precision"], line["reason"])
    assert shown == (429, "quota", "acme", "sent", None, None)


def test_it_is_off_unless_enabled(caplog):
    made, messages = exchange()
    with caplog.at_level(logging.DEBUG):
        answer(made, messages)
        request_log.log_rejection(made.scope, RequestError("too much", "body"))
    assert request_log.LOGGER_NAME not in {record.name for record in caplog.records}


def test_enabling_it_twice_writes_once_and_to_no_other_log(stream):
    request_log.enable(stream)
    made, messages = exchange()
    elsewhere = io.StringIO()
    root = logging.StreamHandler(elsewhere)
    logging.getLogger().addHandler(root)
    try:
        answer(made, messages)
    finally:
        logging.getLogger().removeHandler(root)
    assert stream.getvalue().count("\n") == 1
    assert elsewhere.getvalue() == ""


def test_a_request_that_was_given_no_precision_is_not_logged(stream):
    made, _ = exchange()
    request_log.log_request(Exchange.unchanged(made.scope, None, None))
    assert stream.getvalue() == ""
