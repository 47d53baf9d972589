"""OpenTelemetry: a span around each request that was given a precision, with vLLM's own span of that request inside.

vLLM traces if it is started with ``--otlp-traces-endpoint``: it then makes its exporter the process's tracer provider, and
gives the span ``llm_request`` of every request the parent that the request's ``traceparent`` header names. So the span made
here goes to the same provider, and the header that vLLM reads is replaced by one that names it. Without the package, or
without a provider, nothing happens and the headers stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope

from serve.request_details import RequestDetails

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # vLLM needs the package from some release on; nothing here does.
    trace = None  # type: ignore[assignment]

TRACER_NAME = "matgptq.serve"
CONTEXT_HEADERS = ("traceparent", "tracestate")


@contextmanager
def request_span(
    scope: Scope, precision: str, details: RequestDetails, outcome: Callable[[], int] | None = None
) -> Iterator[Scope]:
    """Trace what happens inside as one request.

    The span is not made the current one: vLLM starts its output loop inside the first request, and would keep it for ever.

    Args:
        outcome: asked at the end for the HTTP status, if given.

    Yields:
        The scope to forward: ``scope``, with the trace context of the span in its headers if there is one.
    """
    if trace is None:
        yield scope
        return
    carrier = _context_headers(scope)
    propagator = TraceContextTextMapPropagator()
    parent = propagator.extract(carrier)
    span = trace.get_tracer(TRACER_NAME).start_span(
        f"{scope['method']} {scope['path']}",
        context=parent,
        kind=trace.SpanKind.SERVER,
        attributes=_attributes(scope, precision, details),
    )
    context = span.get_span_context()
    if not context.is_valid or context.span_id == trace.get_current_span(parent).get_span_context().span_id:
        # No provider: what comes back is nothing, or stands for the client's span.
        yield scope
        return
    forwarded: dict[str, str] = {}
    propagator.inject(forwarded, trace.set_span_in_context(span, parent))
    others = [(name, value) for name, value in scope["headers"] if name.lower().decode("latin-1") not in CONTEXT_HEADERS]
    added = [(name.encode(), value.encode()) for name, value in forwarded.items()]
    try:
        yield {**scope, "headers": [*others, *added]}
    except BaseException as error:
        # The kind of the error only: its message may quote the prompt.
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(trace.Status(trace.StatusCode.ERROR))
        raise
    else:
        if outcome is not None:
            status = outcome()
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(trace.Status(trace.StatusCode.ERROR))
    finally:
        span.end()


def _context_headers(scope: Scope) -> dict[str, str]:
    """The client's trace context. As W3C Trace Context has it: two traceparents are none, several tracestates are one list."""
    found: dict[str, list[str]] = {name: [] for name in CONTEXT_HEADERS}
    for raw, value in scope["headers"]:
        found.get(raw.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    parents, states = found.values()
    return {"traceparent": parents[0], "tracestate": ",".join(states)} if len(parents) == 1 else {}


def _attributes(scope: Scope, precision: str, details: RequestDetails) -> Mapping[str, Any]:
    attributes = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "matgptq.precision": precision,
        "matgptq.precision.reason": details.reason,
        "matgptq.tenant": details.tenant,
        "matgptq.budget.tpot_ms": details.budget_tpot_ms,
        "matgptq.budget.ttft_ms": details.budget_ttft_ms,
        "matgptq.predicted.tpot_ms": details.predicted_tpot_ms,
        "matgptq.predicted.ttft_ms": details.predicted_ttft_ms,
    }
    return {name: value for name, value in attributes.items() if value is not None}
