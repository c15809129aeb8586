"""A short generation of the router's own, through every tier that is in service."""

from __future__ import annotations

import secrets

from opentelemetry import trace

from services.router.admission import Admission
from services.router.choice import NoText
from services.router.dispatch import Dispatcher
from services.router.intake import Intake
from services.router.record import RequestRecord
from services.router.stream import OutputStream
from splitserve.obs.metrics import Metrics

MAX_TOKENS = 2
MAX_PENDING_BYTES = 1 << 20


class Canary:
    """Takes the way of a long prompt, past admission: a full router still serves.

    That way leads through prefill tier and store if they are in service, and else to a decode
    worker alone, as for every request. It leaves no traces, and counts in metrics of its own.
    """

    def __init__(self, intake: Intake, dispatcher: Dispatcher) -> None:
        self._intake = intake
        self._dispatcher = dispatcher
        self._metrics = Metrics()
        self._admission = Admission(max_running=1, max_waiting=1, max_queued_tokens=1)

    async def __call__(self, timeout_s: float) -> bool:
        """Generate two tokens. Whether the prefill tier took part. Raises what went wrong."""
        request = self._intake.canary(timeout_s, MAX_TOKENS)
        with trace.use_span(_unsampled_span()):
            ticket = await self._admission.admit(len(request.prompt))
            try:
                record = RequestRecord(request, ticket, self._metrics, model="")
                stream = OutputStream(request, [NoText()], record, MAX_PENDING_BYTES)
                return await self._dispatcher.run(request, stream, always_split=True)
            finally:
                ticket.release()


def _unsampled_span() -> trace.Span:
    """A parent under which no service records spans."""
    context = trace.SpanContext(
        trace_id=secrets.randbits(128) | 1,
        span_id=secrets.randbits(64) | 1,
        is_remote=False,
        trace_flags=trace.TraceFlags(trace.TraceFlags.DEFAULT),
    )
    return trace.NonRecordingSpan(context)
