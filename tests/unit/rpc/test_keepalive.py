from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from splitserve.errors import Unavailable
from splitserve.rpc.channel import open_channel
from splitserve.rpc.options import BETWEEN_TIERS
from splitserve.rpc.status import error_from_rpc

SERVER = """
import asyncio, re, grpc
from splitserve.rpc.server import RpcServer

async def unary(request, context):
    if request == b"busy":
        # One call of C code that holds the interpreter lock for a second and more.
        re.match(r"(a+)+$", "a" * 25 + "b")
        return request
    await asyncio.Event().wait()

async def main():
    server = RpcServer("peer", "127.0.0.1:0")
    handler = grpc.unary_unary_rpc_method_handler(unary)
    server.grpc.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Peer", {"Unary": handler}),)
    )
    print(await server.start([]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
async def peer() -> AsyncIterator[tuple[int, int]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    port = int(await asyncio.wait_for(process.stdout.readline(), 20))
    yield process.pid, port
    process.kill()
    await process.wait()


async def test_stopped_peer_is_noticed_within_about_a_second(peer: tuple[int, int]) -> None:
    pid, port = peer
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test.Peer/Unary")(b"")
        await channel.channel_ready()
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 10)
        noticed_s = time.monotonic() - stopped
    assert isinstance(error_from_rpc(caught.value), Unavailable)
    # The core grants a peer one more timeout than the setting says. Half a second is for a
    # machine that is busy with other tests.
    assert noticed_s < (BETWEEN_TIERS.interval_ms + 2 * BETWEEN_TIERS.timeout_ms) / 1000 + 0.5


CLIENT = """
import asyncio, sys
from splitserve.rpc.channel import open_channel

async def main():
    channel = open_channel(sys.argv[1])
    call = channel.unary_stream("/test.Echo/ServerStream")(b"sleep")
    await call.read()
    print("open", flush=True)
    await call.code()

asyncio.run(main())
"""


async def test_stopped_client_has_its_calls_cancelled(echo: Any) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, echo.address), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 20)
        process.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(echo.service.closed.wait(), 5)
        assert echo.service.cancelled.is_set()
    finally:
        process.kill()
        await process.wait()


async def test_busy_peer_is_not_taken_for_dead(peer: tuple[int, int]) -> None:
    _, port = peer
    async with open_channel(f"127.0.0.1:{port}") as channel:
        started = time.monotonic()
        answer = await channel.unary_unary("/test.Peer/Unary")(b"busy", timeout=30)
        busy_s = time.monotonic() - started
    assert answer == b"busy"
    assert busy_s > BETWEEN_TIERS.timeout_ms / 1000, "the peer was not busy for long enough to tell"


async def test_idle_connection_is_not_closed_for_too_many_pings(peer: tuple[int, int]) -> None:
    _, port = peer
    async with open_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        watching = asyncio.ensure_future(
            channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        )
        done, _ = await asyncio.wait({watching}, timeout=8 * BETWEEN_TIERS.interval_ms / 1000)
        watching.cancel()
    assert not done, "the connection was lost"
