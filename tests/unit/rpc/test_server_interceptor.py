from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import pytest
from opentelemetry import trace

from splitserve.errors import InvalidRequest, NoWorker, Overloaded
from splitserve.obs.collector import CollectedSpan, Collector
from splitserve.rpc.status import error_from_rpc

SOON_S = 5.0


async def _messages(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def _failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, SOON_S)
    return caught.value


def _span(collector: Collector, service: str, method: str) -> CollectedSpan:
    def is_it(span: CollectedSpan) -> bool:
        return span.service == service and span.name == f"test.Echo/{method}"

    spans = collector.wait_for(lambda spans: any(map(is_it, spans)))
    return next(filter(is_it, spans))


async def test_all_four_kinds_of_rpc_pass_through(echo: Any) -> None:
    assert await echo.unary()(b"a") == b"a"
    assert [m async for m in echo.server_stream()(b"a")] == [b"a0", b"a1", b"a2"]
    assert await echo.client_stream()(_messages(b"a", b"b")) == b"ab"
    assert [m async for m in echo.both()(_messages(b"a", b"b"))] == [b"a", b"b"]
    for method in ("Unary", "ServerStream", "ClientStream", "Both"):
        assert echo.handled(method, "OK") == 1


async def test_reader_writer_style_of_a_client_stream(echo: Any) -> None:
    call = echo.both()()
    await call.write(b"a")
    assert await call.read() == b"a"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("method", ["Unary", "ServerStream", "ClientStream", "Both"])
async def test_server_span_is_the_child_of_the_client_span(
    echo: Any, collector: Collector, method: str
) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "Unary": lambda: echo.unary()(b"a"),
        "ServerStream": lambda: _drain(echo.server_stream()(b"a")),
        "ClientStream": lambda: echo.client_stream()(_messages(b"a")),
        "Both": lambda: _drain(echo.both()(_messages(b"a"))),
    }
    with echo.tracing.tracer.start_as_current_span("parent") as parent:
        await calls[method]()
    client, server = await asyncio.gather(
        asyncio.to_thread(_span, collector, "client", method),
        asyncio.to_thread(_span, collector, "server", method),
    )
    assert client.parent_id == trace.format_span_id(parent.get_span_context().span_id)
    assert server.parent_id == client.span_id
    assert server.trace_id == client.trace_id
    assert (client.kind, server.kind) == ("CLIENT", "SERVER")
    for span in (client, server):
        assert span.status == "UNSET"
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["rpc.method"] == f"test.Echo/{method}"
        assert span.attributes["rpc.response.status_code"] == "OK"


async def _drain(call: Any) -> list[bytes]:
    return [message async for message in call]


async def test_handler_sees_span_and_request_id(echo: Any) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await echo.unary()(
        b"context",
        metadata=(("x-request-id", "r-1"),),
    )
    with echo.tracing.tracer.start_as_current_span("parent") as parent:
        await echo.unary()(b"context", metadata=(("x-request-id", "r-2"),))
        expected = trace.format_trace_id(parent.get_span_context().trace_id)
    assert [request_id for _, request_id in echo.service.saw] == ["r-1", "r-2"]
    assert echo.service.saw[1][0] == expected
    assert echo.service.saw[0][0] != trace_id


async def test_foreign_trace_context_is_taken_up(echo: Any) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with grpc.aio.insecure_channel(echo.address) as plain:
        await plain.unary_unary("/test.Echo/Unary")(
            b"context", metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
        )
    assert echo.service.saw == [(trace_id, None)]


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-0-0-00", "ff" * 500])
async def test_malformed_trace_context_starts_a_new_trace(echo: Any, traceparent: str) -> None:
    async with grpc.aio.insecure_channel(echo.address) as plain:
        await plain.unary_unary("/test.Echo/Unary")(
            b"context", metadata=(("traceparent", traceparent),)
        )
    ((trace_id, _),) = echo.service.saw
    assert int(trace_id, 16) != 0


async def test_invalid_request_names_its_fields(echo: Any, collector: Collector) -> None:
    failure = await _failure(echo.unary()(b"invalid"))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = error_from_rpc(failure)
    assert isinstance(error, InvalidRequest)
    assert [(v.field, v.description) for v in error.violations] == [
        ("sampling.top_p", "must be in (0, 1]")
    ]
    span = await asyncio.to_thread(_span, collector, "server", "Unary")
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert span.status == "UNSET", "a client's fault is not an error of the server"


async def test_overloaded_says_when_to_come_back(echo: Any) -> None:
    error = error_from_rpc(await _failure(echo.unary()(b"busy")))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 1.5
    assert error.message == "the queue is full"


async def test_error_in_a_stream_comes_after_what_was_sent(echo: Any) -> None:
    received: list[bytes] = []

    async def receive() -> None:
        async for message in echo.server_stream()(b"no worker"):
            received.append(message)

    failure = await _failure(receive())
    assert received == [b"no worker0", b"no worker1", b"no worker2"]
    assert isinstance(error_from_rpc(failure), NoWorker)
    assert echo.handled("ServerStream", "UNAVAILABLE") == 1


async def test_unknown_exception_shows_only_a_trace_id(
    echo: Any, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        failure = await _failure(echo.unary()(b"fault"))
    assert failure.code() is grpc.StatusCode.INTERNAL
    shown = re.fullmatch(r"internal error, trace ([0-9a-f]{32})", failure.details() or "")
    assert shown is not None
    span = await asyncio.to_thread(_span, collector, "server", "Unary")
    assert span.trace_id == shown[1]
    assert (span.status, span.attributes["error.type"]) == ("ERROR", "INTERNAL")
    assert shown[1] in caplog.text
    assert "KeyError: 'a secret'" in caplog.text


async def test_status_set_by_a_handler_is_recorded(echo: Any) -> None:
    failure = await _failure(echo.unary()(b"abort"))
    assert (failure.code(), failure.details()) == (grpc.StatusCode.ABORTED, "as told")
    assert echo.handled("Unary", "ABORTED") == 1


async def test_cancel_reaches_the_handler_and_is_recorded(echo: Any, collector: Collector) -> None:
    call = echo.server_stream()(b"sleep")
    for _ in range(3):
        await call.read()
    call.cancel()
    await asyncio.wait_for(echo.service.cancelled.wait(), SOON_S)
    await asyncio.wait_for(echo.service.closed.wait(), SOON_S)
    span = await asyncio.to_thread(_span, collector, "server", "ServerStream")
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert span.status == "UNSET"
    client = await asyncio.to_thread(_span, collector, "client", "ServerStream")
    assert client.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_cancel_closes_a_generator_that_waits_for_its_reader(echo: Any) -> None:
    call = echo.server_stream()(b"flood")
    await call.read()
    call.cancel()
    await asyncio.wait_for(echo.service.closed.wait(), SOON_S)
    span_codes = {"CANCELLED": echo.handled("ServerStream", "CANCELLED")}
    assert span_codes == {"CANCELLED": 1}, "not an internal error, though a write may have failed"


@pytest.mark.parametrize(("method", "order"), [("Unary", b"sleep"), ("ServerStream", b"sleep")])
async def test_deadline_is_recorded_as_such(
    echo: Any, collector: Collector, method: str, order: bytes
) -> None:
    call = echo.unary() if method == "Unary" else echo.server_stream()

    async def consume() -> None:
        if method == "Unary":
            await call(order, timeout=0.2)
        else:
            await _drain(call(order, timeout=0.2))

    failure = await _failure(consume())
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    span = await asyncio.to_thread(_span, collector, "server", method)
    assert span.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert span.status == "ERROR"


async def test_health_checks_leave_no_span(echo: Any, collector: Collector) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(echo.channel)  # type: ignore[no-untyped-call]
    await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))
    await echo.unary()(b"a")
    await asyncio.to_thread(_span, collector, "server", "Unary")
    assert not _named(collector.spans(), "Health")


def _named(spans: Sequence[CollectedSpan], part: str) -> list[CollectedSpan]:
    return [span for span in spans if part in span.name]


async def test_unknown_method_adds_no_series(echo: Any) -> None:
    failure = await _failure(echo.channel.unary_unary("/test.Echo/Nothing")(b""))
    assert failure.code() is grpc.StatusCode.UNIMPLEMENTED
    assert echo.handled("Nothing", "UNIMPLEMENTED") == 0
