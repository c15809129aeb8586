"""The router before real prefill, decode and store processes, with the engine that adds up."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from services.router.__main__ import Router, started
from services.router.config import RouterConfig
from splitserve.config import load
from splitserve.engine.fake import expected_tokens
from splitserve.errors import Unavailable
from splitserve.kv.control import StoreControl
from splitserve.obs.tracing import Tracing
from splitserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

LEASE_S = 1.0


@dataclass
class Service:
    """One service as a process, that can be killed and started again at the same port."""

    name: str
    flags: list[str]
    port: int = 0
    process: Any = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"services.{self.name}", f"--port={self.port}"),
            *("--metrics-port=0", *self.flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        line = await asyncio.wait_for(self.process.stdout.readline(), 30)
        self.port = json.loads(line)["port"]

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


@dataclass
class Tiers:
    services: dict[str, Service]
    router: Router
    stub: Any
    ends: Counter[str] = field(default_factory=Counter)

    async def ask(self, prompt: list[int], count: int, **sampling: Any) -> list[Any]:
        request = inference_pb2.GenerateRequest(
            tokens=inference_pb2.TokenPrompt(ids=prompt),
            sampling=common_pb2.SamplingParams(max_tokens=count, ignore_eos=True, **sampling),
        )
        return [message async for message in self.stub.Generate(request, timeout=15)]

    async def ask_until(self, stop: asyncio.Event, seed: int) -> None:
        """One client that asks again and again and notes how each request ended."""
        dice = random.Random(seed)
        while not stop.is_set():
            prompt = [dice.randrange(1, 999) for _ in range(dice.randrange(5, 200))]
            try:
                ids = tokens_of(await self.ask(prompt, 20, temperature=0.0))
            except grpc.aio.AioRpcError as error:
                self.ends[error.code().name] += 1
            else:
                self.ends["right" if ids == expected_tokens(prompt, 20) else "wrong"] += 1


def tokens_of(messages: list[Any], choice: int = 0) -> list[int]:
    return [
        token.id
        for message in messages
        for delta in message.choices
        if delta.index == choice
        for token in delta.tokens
    ]


@pytest.fixture
async def tiers() -> AsyncIterator[Tiers]:
    store = Service("kvstore", ["--host=127.0.0.1"])
    services = {"kvstore": store}
    try:
        store.port = await free_port()
        store.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.kvstore", f"--port={store.port}"),
            "--metrics-port=0",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        flags = ["--engine=fake", f"--kvstore={store.address}", "--fake-step-ms=2"]
        for name in ("prefill", "decode"):
            services[name] = Service(name, flags)
            await services[name].start()
        config = load(
            RouterConfig,
            [
                *("--port=0", "--skip-tokenizer-init", "--canary-interval-s=0.2"),
                f"--prefill={services['prefill'].address}",
                f"--decode={services['decode'].address}",
                f"--lease-ttl-ms={round(LEASE_S * 1000)}",
            ],
        )
        async with started(config, Tracing.off()) as router:
            await until(lambda: router.readiness.ready, 30)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{router.server.port}") as channel:
                yield Tiers(services, router, inference_pb2_grpc.InferenceServiceStub(channel))
    finally:
        for service in services.values():
            if service.process is not None:
                await service.kill()


async def free_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


async def until(condition: Any, timeout: float) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)


async def test_exact_tokens_by_every_route(tiers: Tiers) -> None:
    prompt = [7 + i % 50 for i in range(100)]
    first = await tiers.ask(prompt, 30, temperature=0.0)
    assert tokens_of(first) == expected_tokens(prompt, 30)
    assert first[-1].usage.cached_prompt_tokens == 0
    # The second time the decode worker has the prompt, the short one never leaves it.
    second = await tiers.ask(prompt, 30, temperature=0.0)
    assert tokens_of(second) == tokens_of(first)
    assert second[-1].usage.cached_prompt_tokens > 0
    short = await tiers.ask([3, 5], 3, temperature=0.0)
    assert tokens_of(short) == [13, 52, 260]


async def test_a_seed_draws_the_same_by_every_route(tiers: Tiers) -> None:
    prompt = [7 + i % 50 for i in range(100)]
    split = await tiers.ask(prompt, 10, seed=11, n=3)
    local = await tiers.ask(prompt, 10, seed=11, n=3)
    for choice in range(3):
        assert len(tokens_of(split, choice)) == 10
        assert tokens_of(split, choice) == tokens_of(local, choice)
    assert tokens_of(split, 0) != tokens_of(split, 1)


async def held_blocks(control: StoreControl) -> int | None:
    """None while the store is away."""
    try:
        return (await control.stats()).held_blocks
    except Unavailable:
        return None


def split_works(router: Router) -> bool:
    """As the gauge tells."""
    return router.metrics.registry.get_sample_value("splitserve_router_split_working") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["prefill", "decode", "kvstore"])
async def test_kill_9_under_load(tiers: Tiers, victim: str) -> None:
    stop = asyncio.Event()
    clients = [asyncio.create_task(tiers.ask_until(stop, seed)) for seed in range(8)]
    await until(lambda: tiers.ends["right"] > 20, 30)
    service = tiers.services[victim]
    await service.kill()
    if victim == "kvstore":
        service.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.kvstore", f"--port={service.port}"),
            "--metrics-port=0",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    else:
        await service.start()
    tiers.ends.clear()
    await until(lambda: tiers.ends["right"] > 20, 30)
    await until(lambda: tiers.router.readiness.ready, 5)
    stop.set()
    await asyncio.gather(*clients)
    assert set(tiers.ends) <= {"right", "UNAVAILABLE"}
    control = StoreControl(tiers.services["kvstore"].address)
    try:
        async with asyncio.timeout(LEASE_S + 10):
            while await held_blocks(control) != 0:  # noqa: ASYNC110 - it is polled
                await asyncio.sleep(0.05)
        await until(lambda: split_works(tiers.router), 10)
    finally:
        await control.close()
    await until(lambda: not tiers.router.links.num_sessions, 5)
