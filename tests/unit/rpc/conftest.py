"""A real server with a handler of each kind of RPC, its channel, and what both left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from splitserve.errors import InvalidRequest, NoWorker, Overloaded
from splitserve.obs.collector import Collector
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing, setup_tracing
from splitserve.rpc.channel import open_channel
from splitserve.rpc.server import RpcServer

SERVICE = "test.Echo"


@dataclass
class EchoService:
    """Echoes bytes; some requests are orders."""

    closed: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    saw: list[Any] = field(default_factory=list)
    unary_error: Exception | None = None

    async def unary(self, request: bytes, context: Any) -> bytes:
        await self._obey(request, context)
        return request

    async def server_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            for index in range(3):
                yield request + str(index).encode()
            await self._obey(request, context)
            while request == b"flood":
                yield bytes(64 * 1024)
        finally:
            self.closed.set()

    async def client_stream(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            await self._obey(request, context)
            yield request

    async def _obey(self, order: bytes, context: Any) -> None:
        if order == b"sleep":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if order == b"abort":
            await context.abort(grpc.StatusCode.ABORTED, "as told")
        if order == b"invalid":
            raise InvalidRequest.single("sampling.top_p", "must be in (0, 1]")
        if order == b"busy":
            raise Overloaded("the queue is full", retry_after_s=1.5)
        if order == b"no worker":
            raise NoWorker("no decode worker is ready")
        if order == b"fault":
            raise KeyError("a secret")
        if order == b"raise" and self.unary_error is not None:
            raise self.unary_error
        if order == b"context":
            from opentelemetry import trace

            from splitserve.obs.logging import current_request_id

            span = trace.get_current_span().get_span_context()
            self.saw.append((trace.format_trace_id(span.trace_id), current_request_id()))


def add_echo(server: grpc.aio.Server, service: EchoService, name: str = SERVICE) -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(service.unary),
        "ServerStream": grpc.unary_stream_rpc_method_handler(service.server_stream),
        "ClientStream": grpc.stream_unary_rpc_method_handler(service.client_stream),
        "Both": grpc.stream_stream_rpc_method_handler(service.both),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


@dataclass
class Echo:
    """What a test talks to."""

    server: RpcServer
    service: EchoService
    channel: grpc.aio.Channel
    metrics: Metrics
    tracing: Tracing
    address: str

    def handled(self, method: str, code: str) -> float:
        """How many calls of `method` ended with `code`."""
        value = self.metrics.registry.get_sample_value(
            "splitserve_rpc_server_handled_total", {"method": f"/{SERVICE}/{method}", "code": code}
        )
        return value or 0.0

    def unary(self) -> Any:
        return self.channel.unary_unary(f"/{SERVICE}/Unary")

    def server_stream(self) -> Any:
        return self.channel.unary_stream(f"/{SERVICE}/ServerStream")

    def client_stream(self) -> Any:
        return self.channel.stream_unary(f"/{SERVICE}/ClientStream")

    def both(self) -> Any:
        return self.channel.stream_stream(f"/{SERVICE}/Both")


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


def _traced(service: str, collector: Collector) -> Tracing:
    return setup_tracing(service, collector.endpoint, export_delay_s=0.02, of_process=False)


@pytest.fixture
async def echo(collector: Collector) -> AsyncIterator[Echo]:
    server_tracing = _traced("server", collector)
    client_tracing = _traced("client", collector)
    metrics = Metrics()
    server = RpcServer("echo", "127.0.0.1:0", tracing=server_tracing, metrics=metrics)
    service = EchoService()
    add_echo(server.grpc, service)
    port = await server.start([SERVICE])
    address = f"127.0.0.1:{port}"
    channel = open_channel(address, tracing=client_tracing)
    yield Echo(server, service, channel, metrics, client_tracing, address)
    await channel.close()
    await server.stop()
    server_tracing.shutdown()
    client_tracing.shutdown()
