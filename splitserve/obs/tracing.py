"""Traces: one tracer a process, exported over OTLP, or none at all.

Without an endpoint nothing is started: no thread, no queue. An incoming trace context still
travels on, so that a service without tracing does not cut a trace in two. With an endpoint that
cannot be reached spans are dropped, and two log lines say when that began and ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, Status, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

SCOPE = "splitserve"
EXPORT_DELAY_S = 0.5
EXPORT_TIMEOUT_S = 2.0
GIVE_UP_S = 0.5
SHUTDOWN_TIMEOUT_S = 2.0

_PROPAGATOR = TraceContextTextMapPropagator()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracing:
    """A process's tracer. `provider` is None where tracing is off."""

    tracer: Tracer
    provider: TracerProvider | None = None
    exporter: SpanExporter | None = None

    @classmethod
    def off(cls) -> Tracing:
        """No spans; incoming contexts still travel on."""
        return cls(trace.NoOpTracer())

    @classmethod
    def of_process(cls) -> Tracing:
        """The tracing that `setup_tracing` installed in this process, or none."""
        return cls(trace.get_tracer(SCOPE))

    def record_span(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        parent: Context | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        status: Status | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        events: Iterable[tuple[str, int]] = (),
    ) -> None:
        """A span known only afterwards. Times are Unix nanoseconds (`time.time_ns`).

        `events` are pairs of a name and a time. Without `parent` the current span is the parent.
        """
        span = self.tracer.start_span(
            name, context=parent, kind=kind, attributes=attributes, start_time=start_ns
        )
        for event_name, event_ns in events:
            span.add_event(event_name, timestamp=event_ns)
        if status is not None:
            span.set_status(status)
        span.end(end_time=max(start_ns, end_ns))

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Sends what is left and stops, within `timeout_s` and a little."""
        if self.provider is None:
            return
        # The provider waits for the exporter's retries, which are longer than anyone waits for
        # a process to end. After the timeout the exporter is told to give them up.
        worker = threading.Thread(target=self.provider.shutdown, name="trace-flush", daemon=True)
        worker.start()
        worker.join(timeout_s)
        if worker.is_alive() and self.exporter is not None:
            self.exporter.shutdown()
            worker.join(GIVE_UP_S)


def setup_tracing(
    service_name: str,
    otlp_endpoint: str | None,
    *,
    instance_id: str | None = None,
    export_delay_s: float = EXPORT_DELAY_S,
    of_process: bool = True,
) -> Tracing:
    """Starts tracing to `otlp_endpoint`, such as `http://127.0.0.1:4317`; None or "": off.

    A finished span is sent `export_delay_s` later, with the others of that time. With
    `of_process` the tracer is also what `Tracing.of_process` finds, as long as it is the
    first of this process; several services in one process pass theirs by hand.
    """
    if not otlp_endpoint:
        return Tracing.off()
    attributes: dict[str, AttributeValue] = {SERVICE_NAME: service_name}
    if instance_id is not None:
        attributes[SERVICE_INSTANCE_ID] = instance_id
    provider = TracerProvider(
        sampler=ParentBased(root=ALWAYS_ON),
        resource=Resource.create(attributes),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(
        endpoint=otlp_endpoint,
        insecure=not otlp_endpoint.startswith("https://"),
        timeout=EXPORT_TIMEOUT_S,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            _QuietExporter(exporter, otlp_endpoint), schedule_delay_millis=export_delay_s * 1000
        )
    )
    if of_process and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(provider)
    return Tracing(provider.get_tracer(SCOPE), provider, exporter)


class _QuietExporter(SpanExporter):
    """Logs when an endpoint is lost and found, instead of every batch that fails."""

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._failing = False
        for noisy in (
            "opentelemetry.exporter.otlp.proto.grpc",
            "opentelemetry.sdk._shared_internal",
        ):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            _log.warning("traces do not reach %s; spans are dropped until they do", self._endpoint)
        elif self._failing and not failing:
            _log.info("traces reach %s again", self._endpoint)
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)


def inject(carrier: MutableMapping[str, str], context: Context | None = None) -> None:
    """Writes the W3C trace context of the current span, or of `context`, into `carrier`."""
    _PROPAGATOR.inject(carrier, context=context)


def extract(carrier: Mapping[str, str]) -> Context:
    """The context that `carrier` tells of. A missing or malformed one gives an empty context."""
    return _PROPAGATOR.extract(carrier, context=Context())


@contextmanager
def use_context(context: Context) -> Iterator[None]:
    """What is called, logged and started inside belongs to the trace of `context`."""
    token = otel_context.attach(context)
    try:
        yield
    finally:
        otel_context.detach(token)


def trace_context() -> dict[str, str]:
    """The current span as a plain mapping, for `Submit.trace_context`; empty if there is none."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return carrier


def extract_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """The context that gRPC metadata tells of."""
    carrier = {
        key: value
        for key, value in metadata or ()
        if key in _PROPAGATOR.fields and isinstance(value, str)
    }
    return extract(carrier)
