from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.errors import ConfigError, Unauthenticated
from splitserve.obs.metrics import Metrics
from splitserve.rpc.channel import open_channel
from splitserve.rpc.server import RpcServer
from splitserve.rpc.status import error_from_rpc
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

SOON_S = 5.0
KVSTORE = "splitserve.v1.KvStoreService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _health(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]


async def _status(channel: grpc.aio.Channel, name: str) -> int:
    answer = await _health(channel).Check(health_pb2.HealthCheckRequest(service=name))
    return int(answer.status)


async def test_live_from_the_start_and_ready_when_told(echo: Any) -> None:
    names = ("readiness", "", "test.Echo")
    assert await _status(echo.channel, "liveness") == SERVING
    for name in names:
        assert await _status(echo.channel, name) == NOT_SERVING
    echo.server.set_ready(True)
    for name in names:
        assert await _status(echo.channel, name) == SERVING
    echo.server.set_ready(False)
    assert await _status(echo.channel, "readiness") == NOT_SERVING
    assert await _status(echo.channel, "liveness") == SERVING


async def test_health_of_an_unknown_name_is_not_found(echo: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _status(echo.channel, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watcher_is_told_of_changes_after_another_has_left(echo: Any) -> None:
    request = health_pb2.HealthCheckRequest(service="readiness")
    leaver, stayer = _health(echo.channel).Watch(request), _health(echo.channel).Watch(request)
    assert (await leaver.read()).status == NOT_SERVING
    assert (await stayer.read()).status == NOT_SERVING
    leaver.cancel()
    echo.server.set_ready(True)
    assert (await asyncio.wait_for(stayer.read(), SOON_S)).status == SERVING
    stayer.cancel()


async def test_drain_turns_readiness_off_and_lets_streams_end(echo: Any) -> None:
    echo.server.set_ready(True)
    watch = _health(echo.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == SERVING
    stream = echo.both()()
    await stream.write(b"a")
    assert await stream.read() == b"a"
    draining = asyncio.ensure_future(echo.server.drain(SOON_S))
    assert (await asyncio.wait_for(watch.read(), SOON_S)).status == NOT_SERVING
    echo.server.set_ready(True)
    await stream.write(b"b")
    assert await asyncio.wait_for(stream.read(), SOON_S) == b"b"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    watch.cancel()
    await asyncio.wait_for(draining, SOON_S)


async def test_drain_cancels_what_outlasts_the_grace(echo: Any) -> None:
    call = echo.server_stream()(b"sleep")
    await call.read()
    await asyncio.wait_for(echo.server.drain(0.1), SOON_S)
    await asyncio.wait_for(echo.service.closed.wait(), SOON_S)
    call.cancel()


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
async def test_plaintext_off_loopback_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match="--tls-cert"):
        RpcServer("echo", bind)


async def test_plaintext_off_loopback_can_be_allowed() -> None:
    server = RpcServer("echo", "0.0.0.0:0", insecure=True)
    assert await server.start([]) > 0
    await server.stop()


@pytest.mark.parametrize("bind", ["", "127.0.0.1", ":1", "127.0.0.1:x", "127.0.0.1:70000", "::1:5"])
async def test_malformed_bind_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match="bind"):
        RpcServer("echo", bind)


async def test_taken_port_is_refused(echo: Any) -> None:
    second = RpcServer("second", echo.address)
    with pytest.raises(ConfigError, match="cannot listen"):
        await second.start([])


class _Doorkeeper(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        if ("authorization", "Bearer k") not in handler_call_details.invocation_metadata:
            raise Unauthenticated("send `authorization: Bearer KEY`")
        return await continuation(handler_call_details)


async def test_refusal_of_an_added_interceptor_is_a_proper_status() -> None:
    metrics = Metrics()
    server = RpcServer("echo", "127.0.0.1:0", interceptors=[_Doorkeeper()], metrics=metrics)
    port = await server.start([])
    async with open_channel(f"127.0.0.1:{port}") as channel:
        for method in ("/grpc.health.v1.Health/Check", "/made/up", "/made/too"):
            for make in (channel.unary_unary, channel.stream_unary):
                argument: Any = b"" if make == channel.unary_unary else _one(b"")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await make(method)(argument, timeout=SOON_S)
                assert isinstance(error_from_rpc(caught.value), Unauthenticated)
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        await check(b"\n\x08liveness", metadata=(("authorization", "Bearer k"),))
    refused = {"method": "/unknown", "code": "UNAUTHENTICATED"}
    name = "splitserve_rpc_server_handled_total"
    assert metrics.registry.get_sample_value(name, refused) == 6
    await server.stop()


async def _one(message: bytes) -> Any:
    yield message


class _Store(kvstore_pb2_grpc.KvStoreServiceServicer):
    async def GetStats(self, request: Any, context: Any) -> kvstore_pb2.GetStatsResponse:
        return kvstore_pb2.GetStatsResponse(epoch=7)

    async def WriteBlocks(self, requests: Any, context: Any) -> kvstore_pb2.WriteBlocksResponse:
        written = 0
        async for request in requests:
            written += len(request.data)
        return kvstore_pb2.WriteBlocksResponse(written_bytes=written)


@pytest.fixture
async def store() -> Any:
    server = RpcServer("kvstore", "127.0.0.1:0", max_message_bytes=64 * 1024)
    kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(_Store(), server.grpc)
    port = await server.start([KVSTORE])
    server.set_ready(True)
    yield f"127.0.0.1:{port}"
    await server.stop()


async def _code_of_raw(address: str, method: str, message: bytes, streamed: bool = False) -> Any:
    channel = open_channel(address)

    async def messages() -> Any:
        yield message

    try:
        if streamed:
            await channel.stream_unary(f"/{KVSTORE}/{method}")(messages(), timeout=SOON_S)
        else:
            await channel.unary_unary(f"/{KVSTORE}/{method}")(message, timeout=SOON_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        await channel.close()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("method", "streamed"), [("GetStats", False), ("WriteBlocks", True)])
async def test_malformed_message_is_the_callers_fault(
    store: str, method: str, streamed: bool
) -> None:
    code = await _code_of_raw(store, method, b"\xff\xff\xff", streamed)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert await _code_of_raw(store, "GetStats", b"") is grpc.StatusCode.OK


@pytest.mark.parametrize(("method", "streamed"), [("GetStats", False), ("WriteBlocks", True)])
async def test_oversize_message_is_refused(store: str, method: str, streamed: bool) -> None:
    code = await _code_of_raw(store, method, bytes(256 * 1024), streamed)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await _code_of_raw(store, "GetStats", b"") is grpc.StatusCode.OK


async def test_method_that_is_not_implemented(store: str) -> None:
    code = await _code_of_raw(store, "GrantLease", b"")
    assert code is grpc.StatusCode.UNIMPLEMENTED


def _grpcurl() -> str:
    found = shutil.which("grpcurl") or str(Path(sys.executable).parent / "grpcurl")
    if not Path(found).exists():
        pytest.skip("grpcurl is not installed")
    return found


async def _run_grpcurl(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        _grpcurl(),
        *("-plaintext", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), SOON_S)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_grpcurl_lists_describes_and_calls(store: str) -> None:
    listed = await _run_grpcurl(store, "list")
    assert listed.split() == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        KVSTORE,
    ]
    described = await _run_grpcurl(store, "describe", KVSTORE)
    assert "rpc GrantLease ( .splitserve.v1.GrantLeaseRequest )" in described
    assert '"epoch": "7"' in await _run_grpcurl(store, f"{KVSTORE}/GetStats")
    checked = await _run_grpcurl(
        "-d", '{"service": "readiness"}', store, "grpc.health.v1.Health/Check"
    )
    assert '"status": "SERVING"' in checked
