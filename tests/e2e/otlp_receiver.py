"""An OTLP receiver of traces, on the service that OpenTelemetry's own protocol package defines."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class OtlpReceiver(TraceServiceServicer):
    """Keeps the spans that come in.

    Args:
        url: where it listens.
    """

    def __init__(self, url: str):
        self.url = url
        self._spans: list[Span] = []

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self._spans.extend(scope.spans)
        return ExportTraceServiceResponse()

    def spans(self, trace_id: str) -> dict[str, Span]:
        """Spans of a trace so far, by name."""
        return {span.name: span for span in list(self._spans) if span.trace_id.hex() == trace_id}


def attributes(span: Span) -> dict[str, Any]:
    """Attributes of a span as plain values."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """A receiver on a free port of this machine."""
    server = grpc.server(ThreadPoolExecutor(2))
    receiver = OtlpReceiver(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    add_TraceServiceServicer_to_server(receiver, server)
    server.start()
    yield receiver
    server.stop(None).wait(10)
