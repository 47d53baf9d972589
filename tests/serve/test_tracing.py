"""Spans of requests, through OpenTelemetry's own SDK."""

import asyncio

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from vllm.tracing import extract_trace_context, extract_trace_headers

import serve.tracing
from serve.request_details import RequestDetails
from serve.tracing import request_span

DETAILS = RequestDetails("budget", "acme", 25.0, None, 21.0, None)
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = (b"Traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01".encode())


def scope(*headers: tuple[bytes, bytes]) -> dict:
    return {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"test"), *headers]}


def configure(monkeypatch, **options) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(**options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


@pytest.fixture
def exporter(monkeypatch):
    return configure(monkeypatch)


def headers(forwarded: dict) -> dict[str, str]:
    """As vLLM sees them."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in forwarded["headers"]}


def vllms_span(forwarded: dict) -> None:
    """What vLLM does when a request ends, with the functions that it uses."""
    context = extract_trace_context(extract_trace_headers(headers(forwarded)))
    trace.get_tracer("vllm").start_span("llm_request", context=context, kind=SpanKind.SERVER).end()


def test_a_request_is_a_span_with_what_was_decided(exporter):
    with request_span(scope(), "4", DETAILS, lambda: 200):
        pass
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.parent) == ("POST /v1/completions", SpanKind.SERVER, None)
    assert span.status.status_code == StatusCode.UNSET
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
        "matgptq.precision": "4",
        "matgptq.precision.reason": "budget",
        "matgptq.tenant": "acme",
        "matgptq.budget.tpot_ms": 25.0,
        "matgptq.predicted.tpot_ms": 21.0,
    }


def test_the_clients_span_is_its_parent_and_vllms_span_its_child(exporter):
    sent = scope(PARENT, (b"tracestate", b"a=1"), (b"tracestate", b"b=2"))
    with request_span(sent, "4", DETAILS) as forwarded:
        vllms_span(forwarded)
    inner, ours = exporter.get_finished_spans()
    assert {format(span.context.trace_id, "032x") for span in (inner, ours)} == {TRACE_ID}
    assert format(ours.parent.span_id, "016x") == PARENT_ID
    assert inner.parent.span_id == ours.context.span_id
    assert [name for name, _ in forwarded["headers"]] == [b"host", b"traceparent", b"tracestate"]
    assert headers(forwarded)["tracestate"] == "a=1,b=2"
    assert sent["headers"][1] == PARENT


@pytest.mark.parametrize(
    "sent", [[], [PARENT, PARENT], [(b"traceparent", b"nonsense")], [(b"traceparent", b"\xff")], [(b"tracestate", b"a=1")]]
)
def test_without_a_clear_parent_it_starts_a_trace_which_vllm_joins(exporter, sent):
    with request_span(scope(*sent), "4", DETAILS) as forwarded:
        vllms_span(forwarded)
    inner, ours = exporter.get_finished_spans()
    assert ours.parent is None
    assert inner.parent.span_id == ours.context.span_id
    assert [name for name, _ in forwarded["headers"]] == [b"host", b"traceparent"]


def test_requests_at_once_do_not_see_each_others_span(exporter):
    async def one() -> None:
        with request_span(scope(), "4", DETAILS) as forwarded:
            await asyncio.sleep(0)
            assert not trace.get_current_span().get_span_context().is_valid
            vllms_span(forwarded)

    async def both() -> None:
        await asyncio.gather(one(), one())

    asyncio.run(both())
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans}) == 2
    assert {span.parent.span_id for span in spans if span.parent} == {
        span.context.span_id for span in spans if span.parent is None
    }


@pytest.mark.parametrize("error", [ValueError("secret-prompt"), asyncio.CancelledError()])
def test_a_failure_is_named_but_not_quoted(exporter, error):
    with pytest.raises(type(error)), request_span(scope(), "4", DETAILS, lambda: 200):
        raise error
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes["error.type"] == type(error).__name__
    assert "http.response.status_code" not in span.attributes
    assert "secret" not in span.to_json()


@pytest.mark.parametrize(("status", "expected"), [(499, StatusCode.UNSET), (500, StatusCode.ERROR)])
def test_only_the_servers_errors_are_errors(exporter, status, expected):
    with request_span(scope(), "4", DETAILS, lambda: status):
        pass
    assert exporter.get_finished_spans()[0].status.status_code == expected


def test_a_request_that_is_not_sampled_is_not_sampled_by_vllm_either(monkeypatch):
    exporter = configure(monkeypatch, sampler=ALWAYS_OFF)
    with request_span(scope(PARENT), "4", DETAILS) as forwarded:
        pass
    assert headers(forwarded)["traceparent"].endswith("-00")
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize("sent", [[], [PARENT], [PARENT, PARENT]])
@pytest.mark.parametrize("how", ["no provider", "no package"])
def test_without_tracing_the_request_passes_as_it_is(monkeypatch, sent, how):
    if how == "no package":
        monkeypatch.setattr(serve.tracing, "trace", None)
    original = scope(*sent)
    with request_span(original, "4", DETAILS, lambda: 200) as forwarded:
        assert forwarded is original
