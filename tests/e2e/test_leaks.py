"""Clients and strangers that misbehave: nothing stays held, and the suite goes on serving."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import grpc
import pytest

from splitserve.v1 import inference_pb2_grpc

from ..leftovers import nothing_held, shared_files
from ..load import ask, check, request
from ..suite import Service, Suite
from .tiers import AFTER_LEASE_S, Tiers, start_tiers

DEADLINE_S = 30.0
CLIENTS = 32
PROMPT = [(5 * i + 1) % 997 for i in range(150)]


def prompt_of(number: int) -> list[int]:
    return [number + 1, *PROMPT]


async def cancel_at_every_stage(tiers: Tiers) -> None:
    """Before, while and after the prompt is computed; between any two tokens."""
    async with tiers.router.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def leave(number: int) -> None:
            call = stub.Generate(request(prompt_of(number), 200), timeout=DEADLINE_S)
            try:
                if number % 4:
                    for _ in range(number // 2):
                        await call.read()
                else:
                    # As much as this client's share of the prefill tier's work, or less.
                    await asyncio.wait({asyncio.ensure_future(call.read())}, timeout=number / 100)
            finally:
                call.cancel()

        await asyncio.gather(*(leave(number) for number in range(CLIENTS)))


async def ask_for_more_than_the_pool_holds(tiers: Tiers) -> None:
    """32 x 17 pages are wanted and each worker has 256."""
    async with tiers.router.channel() as channel:
        prompts = [prompt_of(number) for number in range(CLIENTS)]
        answers = await asyncio.gather(*(ask(channel, p, 120, DEADLINE_S) for p in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status == "OK", answer.details
        check(answer, prompt, 120)
    assert (await tiers.decode.metrics())["splitserve_num_preemptions_total"] > 0


async def let_deadlines_pass(tiers: Tiers) -> None:
    """While they wait for the prefill, for pages, and in the middle of their output."""
    async with tiers.router.channel() as channel:
        answers = await asyncio.gather(
            *(ask(channel, prompt_of(n), 1000, 0.05 + n / 40) for n in range(CLIENTS))
        )
    for number, answer in enumerate(answers):
        assert answer.status == "DEADLINE_EXCEEDED", answer.details
        check(answer, prompt_of(number), 1000)
        assert answer.seconds < 0.05 + number / 40 + 0.5


async def never_read(tiers: Tiers) -> None:
    """Clients that take nothing and do not hang up: what they hold is freed before they do."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
    async with grpc.aio.insecure_channel(tiers.router.address, options=options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        messages = [request(prompt_of(number), 800) for number in range(4)]
        for message in messages:
            message.sampling.logprobs = 20  # more bytes than any buffer on the way takes
        calls = [stub.Generate(message, timeout=DEADLINE_S) for message in messages]
        await tiers.router.until_metric("splitserve_request_failures_total", lambda n: n >= 4)
        await nothing_held(*tiers.all, within_s=AFTER_LEASE_S)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def send_garbage(tiers: Tiers) -> None:
    """To each port of each service: noise, half an HTTP/2 connection, and a broken message."""
    noise = random.Random(7)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for service in tiers.all:
        for port in (service.port, service.metrics_port):
            for start in (b"", preface, b"GET /metrics HTTP/1.1\r\nHost: \xff"):
                await say(port, start + noise.randbytes(4096))
        await call_with_garbage(service, noise)


async def say(port: int, data: bytes) -> None:
    """The other side may answer anything or hang up, but only once it has read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(10):
            await reader.read()
    except ConnectionError:
        pass
    finally:
        writer.close()


METHODS = {
    "router": "/splitserve.v1.InferenceService/Generate",
    "prefill": "/splitserve.v1.PrefillService/Prefill",
    "decode": "/splitserve.v1.DecodeService/Attach",
    "kvstore": "/splitserve.v1.KvStoreService/ReserveBlocks",
}


async def call_with_garbage(service: Service, noise: random.Random) -> None:
    """Bytes that are no message of the method's type."""
    async with service.channel() as channel:
        for method in (METHODS[service.tier], "/splitserve.v1.Nothing/AtAll"):
            call = channel.stream_stream(method)(timeout=5)
            with contextlib.suppress(grpc.aio.AioRpcError):  # it may have been refused already
                await call.write(b"\xff" + noise.randbytes(256))
                await call.done_writing()
            assert await call.code() in {
                grpc.StatusCode.INTERNAL,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.UNIMPLEMENTED,
            }


@pytest.mark.parametrize(
    "misbehave",
    [
        cancel_at_every_stage,
        ask_for_more_than_the_pool_holds,
        let_deadlines_pass,
        never_read,
        send_garbage,
    ],
)
async def test_nothing_stays_held(
    suite: Suite, misbehave: Callable[[Tiers], Awaitable[None]]
) -> None:
    shared = shared_files()
    tiers = await start_tiers(
        suite, "--fake-step-ms", "5", router_flags=("--max-pending-bytes", "16384")
    )
    await misbehave(tiers)
    await nothing_held(*tiers.all, within_s=AFTER_LEASE_S)
    assert shared_files() == shared
    async with tiers.router.channel() as channel:
        answer = await ask(channel, PROMPT, 20, DEADLINE_S)
    assert answer.status == "OK", answer.details
    check(answer, PROMPT, 20)
