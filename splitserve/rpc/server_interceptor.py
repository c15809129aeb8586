"""What happens around every RPC that a server takes.

1. The caller's trace context is read and a server span opened, current for the handler.
2. The request's name is bound to the log lines of the handler.
3. The call is counted; its end is timed and counted under its status.
4. A SplitserveError becomes its rich status. Any other exception becomes INTERNAL with nothing
   but a trace id, under which the log has the traceback.
5. A cancelled call ends as CANCELLED or DEADLINE_EXCEEDED, and the cancellation goes on up.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from splitserve.errors import SplitserveError
from splitserve.obs import names
from splitserve.obs.logging import bind_request_id
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing, extract_metadata
from splitserve.rpc import status
from splitserve.rpc.handlers import wrap_handler
from splitserve.rpc.spans import finish_span, start_attributes
from splitserve.rpc.types import Context, Handler, ServerInterceptor

UNKNOWN_METHOD = "/unknown"

# Timeouts travel rounded up by at most 1 %, and the client's clock starts first: a call that is
# cancelled this close to its deadline was cancelled by it.
DEADLINE_SLACK_S = 0.025
DEADLINE_SLACK_SHARE = 0.011

# Names come from callers, and every log line of a call repeats its name.
MAX_LOGGED_CHARS = 128

_log = logging.getLogger(__name__)


class CallInterceptor(ServerInterceptor):
    """Spans, metrics, log context and statuses for the calls of one server."""

    def __init__(self, tracing: Tracing, metrics: Metrics | None) -> None:
        self._tracing = tracing
        self._metrics = metrics
        # Keyed by methods that exist, so it cannot be made to grow.
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler inside a `_call` scope."""
        method = handler_call_details.method
        try:
            handler = await continuation(handler_call_details)
        except SplitserveError as error:
            return self._refusal(method, error)
        if handler is None:
            return None
        cached = self._wrapped.get(method)
        if cached is not None and cached[0] is handler:
            return cached[1]

        def scope(request: Any, context: Context) -> Any:
            return self._call(method, request, context)

        wrapped = wrap_handler(handler, scope)
        self._wrapped[method] = (handler, wrapped)
        return wrapped

    def _refusal(self, method: str, error: SplitserveError) -> Handler:
        """What an inner interceptor raised, as the call's answer.

        Such an interceptor may run before the method is known to exist, and callers make up as
        many methods as they like: those are counted under one name.
        """
        counted = method if method in self._wrapped else UNKNOWN_METHOD

        async def refuse(requests: Any, context: Context) -> None:
            raise error

        # On the wire a call has no kind, and this one fits all.
        return wrap_handler(
            grpc.stream_stream_rpc_method_handler(refuse),
            lambda request, context: self._call(counted, request, context),
        )

    @asynccontextmanager
    async def _call(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        started = time.perf_counter()
        timeout_s = context.time_remaining()
        metadata = context.invocation_metadata() or ()
        span = self._open_span(method, metadata)
        code = grpc.StatusCode.UNKNOWN
        if self._metrics is not None:
            self._metrics.rpc_server_started.labels(method).inc()
        with (
            trace.use_span(span, record_exception=False, set_status_on_exception=False),
            bind_request_id(_request_id(request, metadata)),
        ):
            try:
                yield
                code = _code_of(context)
            except asyncio.CancelledError:
                code = _cancelled_code(context, timeout_s)
                raise
            except grpc.aio.AbortError:
                code = _code_of(context)
                raise
            except SplitserveError as error:
                code = error.code
                _log.debug("%s: %s", method, error.message)
                await status.abort(context, error)
            except NotImplementedError:
                # What the generated base class of a service raises.
                code = grpc.StatusCode.UNIMPLEMENTED
                await context.abort(code, "this server does not implement the method")
            except Exception:
                code = grpc.StatusCode.INTERNAL
                await _abort_internal(method, context, span)
            finally:
                finish_span(span, code, server=True)
                self._count_end(method, code, time.perf_counter() - started)

    def _open_span(self, method: str, metadata: Any) -> Span:
        parent = extract_metadata(metadata)
        if method in names.METHODS_WITHOUT_SPANS:
            return trace.get_current_span(parent)
        return self._tracing.tracer.start_span(
            method[1:], parent, SpanKind.SERVER, start_attributes(method)
        )

    def _count_end(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        if self._metrics is None:
            return
        self._metrics.rpc_server_handled.labels(method, code.name).inc()
        self._metrics.rpc_server_duration_seconds.labels(method).observe(seconds)


async def _abort_internal(method: str, context: Context, span: Span) -> None:
    span_context = span.get_span_context()
    if span_context.is_valid:
        trace_id = trace.format_trace_id(span_context.trace_id)
    else:
        trace_id = secrets.token_hex(16)
    _log.exception("%s failed, trace %s", method, trace_id)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error, trace {trace_id}")


def _code_of(context: Context) -> grpc.StatusCode:
    """What the handler set, as a status or its number; OK if it set none."""
    code: Any = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return _CODES.get(code or 0, grpc.StatusCode.UNKNOWN)


def _cancelled_code(context: Context, timeout_s: float | None) -> grpc.StatusCode:
    remaining_s = context.time_remaining()
    if remaining_s is None or timeout_s is None:
        return grpc.StatusCode.CANCELLED
    slack_s = max(DEADLINE_SLACK_S, DEADLINE_SLACK_SHARE * timeout_s)
    if remaining_s <= slack_s:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _request_id(request: Any, metadata: Any) -> str | None:
    request_id = getattr(request, "request_id", None)
    if isinstance(request_id, str) and request_id:
        return request_id[:MAX_LOGGED_CHARS]
    for key, value in metadata:
        if key == names.METADATA_REQUEST_ID and isinstance(value, str):
            return value[:MAX_LOGGED_CHARS]
    return None


_CODES = {code.value[0]: code for code in grpc.StatusCode}
