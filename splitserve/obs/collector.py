"""An OTLP collector inside this process: for tests, and for the demo's picture of a request.

It keeps what it gets in memory and is no place for production traces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Value = str | bool | int | float | list[object] | None

MAX_SPANS = 100_000


@dataclass(frozen=True)
class SpanEvent:
    """Something that happened at one moment of a span."""

    name: str
    time_ns: int


@dataclass(frozen=True)
class CollectedSpan:
    """A finished span. Ids are lower-case hexadecimal; times are Unix nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Value]
    events: tuple[SpanEvent, ...]
    status: str
    """UNSET, OK or ERROR."""
    status_message: str

    @property
    def duration_ms(self) -> float:
        """From start to end."""
        return (self.end_ns - self.start_ns) / 1e6


class Collector:
    """Receives OTLP over gRPC on loopback from the moment it is made until `stop`."""

    def __init__(self, port: int = 0) -> None:
        """Listens on 127.0.0.1; port 0 takes a free one."""
        self._spans: list[CollectedSpan] = []
        self._arrived = threading.Condition()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)]
        )
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            _TraceService(self._take), self._server
        )
        self.port: int = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def endpoint(self) -> str:
        """What to pass as `otlp_endpoint`."""
        return f"http://127.0.0.1:{self.port}"

    def spans(self, trace_id: str | None = None) -> list[CollectedSpan]:
        """What has arrived, of one trace or of all, by start."""
        with self._arrived:
            chosen = [s for s in self._spans if trace_id is None or s.trace_id == trace_id]
        return sorted(chosen, key=lambda span: span.start_ns)

    def wait_for(
        self, predicate: Callable[[Sequence[CollectedSpan]], bool], timeout_s: float = 5.0
    ) -> list[CollectedSpan]:
        """Blocks until `predicate` holds of all spans and returns them. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: predicate(self._spans), timeout_s):
                found = ", ".join(f"{s.service}:{s.name}" for s in self._spans) or "none"
                raise TimeoutError(f"the awaited spans did not arrive; there are: {found}")
            return sorted(self._spans, key=lambda span: span.start_ns)

    def stop(self) -> None:
        """Closes the port. Spans stay readable."""
        self._server.stop(grace=None).wait()

    def _take(self, spans: list[CollectedSpan]) -> None:
        with self._arrived:
            room = MAX_SPANS - len(self._spans)
            self._spans.extend(spans[:room])
            self._arrived.notify_all()


class _TraceService(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, take: Callable[[list[CollectedSpan]], None]) -> None:
        self._take = take

    def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        spans: list[CollectedSpan] = []
        for resource_spans in request.resource_spans:
            resource = _attributes(resource_spans.resource.attributes)
            service = str(resource.get("service.name", "unknown"))
            for scope_spans in resource_spans.scope_spans:
                spans.extend(_collected(span, service) for span in scope_spans.spans)
        self._take(spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def _collected(span: Span, service: str) -> CollectedSpan:
    return CollectedSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=span.name,
        service=service,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(SpanEvent(event.name, event.time_unix_nano) for event in span.events),
        status=("UNSET", "OK", "ERROR")[span.status.code],
        status_message=span.status.message,
    )


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    plain = getattr(value, kind)
    return plain if isinstance(plain, str | bool | int | float) else str(plain)
