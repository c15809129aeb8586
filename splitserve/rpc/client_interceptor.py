"""What happens around every RPC that a client makes: a client span, and its context sent along."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from splitserve.obs import names
from splitserve.obs.tracing import Tracing, inject
from splitserve.rpc.spans import finish_span, start_attributes
from splitserve.rpc.types import (
    StreamStreamInterceptor,
    StreamUnaryInterceptor,
    UnaryStreamInterceptor,
    UnaryUnaryInterceptor,
)

Continuation = Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]]


def client_interceptors(tracing: Tracing) -> list[Any]:
    """One for each kind of RPC: grpc.aio takes an interceptor for one kind only."""
    calls = _TracedCalls(tracing)
    return [_UnaryUnary(calls), _UnaryStream(calls), _StreamUnary(calls), _StreamStream(calls)]


class _TracedCalls:
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    async def start(
        self, continuation: Continuation, details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        method = _text(details.method)
        if method in names.METHODS_WITHOUT_SPANS:
            return await continuation(_with_context(details), request)
        span = self._tracing.tracer.start_span(
            method[1:], None, SpanKind.CLIENT, start_attributes(method)
        )
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            call = await continuation(_with_context(details), request)
        call.add_done_callback(lambda done: finish_span(span, _code_of(done), server=False))
        return call


class _UnaryUnary(UnaryUnaryInterceptor):
    def __init__(self, calls: _TracedCalls) -> None:
        self._calls = calls

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await self._calls.start(continuation, client_call_details, request)


class _UnaryStream(UnaryStreamInterceptor):
    def __init__(self, calls: _TracedCalls) -> None:
        self._calls = calls

    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await self._calls.start(continuation, client_call_details, request)


class _StreamUnary(StreamUnaryInterceptor):
    def __init__(self, calls: _TracedCalls) -> None:
        self._calls = calls

    async def intercept_stream_unary(
        self,
        continuation: Any,
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        return await self._calls.start(continuation, client_call_details, request_iterator)


class _StreamStream(StreamStreamInterceptor):
    def __init__(self, calls: _TracedCalls) -> None:
        self._calls = calls

    async def intercept_stream_stream(
        self,
        continuation: Any,
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        return await self._calls.start(continuation, client_call_details, request_iterator)


def _with_context(details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
    carrier: dict[str, str] = {}
    inject(carrier)
    if not carrier:
        return details
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *carrier.items())
    return details._replace(metadata=metadata)  # type: ignore[attr-defined,no-any-return]


def _code_of(call: Any) -> grpc.StatusCode:
    """The status of a call that is done, whose `code()` therefore never suspends."""
    coroutine = call.code()
    try:
        coroutine.send(None)
    except StopIteration as stop:
        code: grpc.StatusCode = stop.value
        return code
    coroutine.close()
    return grpc.StatusCode.UNKNOWN


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
