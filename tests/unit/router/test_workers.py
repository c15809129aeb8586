"""Workers that come, go, change their minds, or leave discovery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc
import pytest

from services.router.workers import STALE_AFTER_S, Worker, WorkerPool
from splitserve.v1 import worker_pb2, worker_pb2_grpc


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Sends what a test puts into `states`; None ends the stream."""

    def __init__(self) -> None:
        self.states: asyncio.Queue[worker_pb2.WorkerState | None] = asyncio.Queue()

    async def WatchState(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while (state := await self.states.get()) is not None:
            yield worker_pb2.WatchStateResponse(state=state)


class ChangingTargets:
    refresh_s = 0.01

    def __init__(self, *addresses: str) -> None:
        self.addresses = frozenset(addresses)

    async def resolve(self) -> frozenset[str]:
        return self.addresses


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def worker() -> AsyncIterator[tuple[ScriptedWorker, str]]:
    server, scripted = grpc.aio.server(), ScriptedWorker()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield scripted, f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def open_pool() -> AsyncIterator[Callable[..., Any]]:
    pools = []

    async def make(targets: Any, model: str = "", clock: Any = None) -> WorkerPool:
        pool = WorkerPool("decode", targets, grpc.aio.insecure_channel, model, clock or Clock())
        await pool.start()
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        await pool.close()
        assert pool.num_watched == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.002)


def state(**fields: Any) -> worker_pb2.WorkerState:
    return worker_pb2.WorkerState(**{"worker_id": "w", "model": "m", "ready": True, **fields})


async def test_ready_as_it_says(worker: Any, open_pool: Any) -> None:
    scripted, address = worker
    pool = await open_pool(ChangingTargets(address))
    assert await pool.wait_ready(0.01) == []
    waiting = asyncio.create_task(pool.wait_ready(5))
    scripted.states.put_nowait(state(ready=False))
    await until(lambda: len(pool.known()) == 1)
    assert pool.ready() == []
    scripted.states.put_nowait(state())
    assert [found.id for found in await waiting] == ["w"]


async def test_lost_and_found(worker: Any, open_pool: Any) -> None:
    scripted, address = worker
    pool = await open_pool(ChangingTargets(address))
    scripted.states.put_nowait(state())
    assert await pool.wait_ready(5)
    scripted.states.put_nowait(None)
    await until(lambda: not pool.known())
    scripted.states.put_nowait(state(worker_id="next"))
    assert [found.id for found in await pool.wait_ready(5)] == ["next"]


async def test_silent_worker_gets_nothing(worker: Any, open_pool: Any) -> None:
    scripted, address = worker
    clock = Clock()
    pool = await open_pool(ChangingTargets(address), clock=clock)
    scripted.states.put_nowait(state())
    assert await pool.wait_ready(5)
    clock.now += STALE_AFTER_S + 0.1
    assert pool.ready() == []
    assert len(pool.known()) == 1
    waiting = asyncio.create_task(pool.wait_ready(5))
    scripted.states.put_nowait(state())
    assert await waiting


async def test_another_model_is_not_taken_in(worker: Any, open_pool: Any) -> None:
    scripted, address = worker
    pool = await open_pool(ChangingTargets(address), model="ours")
    scripted.states.put_nowait(state(model="theirs"))
    scripted.states.put_nowait(state(model="ours", worker_id="right"))
    assert [found.id for found in await pool.wait_ready(5)] == ["right"]


async def test_a_name_with_its_ending_is_the_same_model(worker: Any, open_pool: Any) -> None:
    scripted, address = worker
    pool = await open_pool(ChangingTargets(address), model="small.Q4")
    scripted.states.put_nowait(state(model="small.Q4.gguf"))
    assert await pool.wait_ready(5)


async def test_leaving_discovery_ends_new_requests_only(worker: Any, open_pool: Any) -> None:
    scripted, address = worker
    targets = ChangingTargets(address)
    pool = await open_pool(targets)
    scripted.states.put_nowait(state())
    assert await pool.wait_ready(5)
    targets.addresses = frozenset()
    await until(lambda: not pool.ready())
    # It may still have requests of ours: the channel stays until it ends the stream.
    assert len(pool.known()) == 1
    scripted.states.put_nowait(None)
    await until(lambda: pool.num_watched == 0)


async def test_an_address_that_never_answered_is_dropped(open_pool: Any) -> None:
    targets = ChangingTargets("127.0.0.1:1")
    pool = await open_pool(targets)
    assert pool.num_watched == 1
    targets.addresses = frozenset()
    await until(lambda: pool.num_watched == 0)


def test_a_rate_is_as_old_as_its_first_report() -> None:
    """Also if the router has lost sight of the worker meanwhile."""
    clock = Clock()
    nothing = cast(Any, None)
    pool, one = WorkerPool("decode", nothing, nothing, "", clock), Worker("a", nothing)

    def told(**state: Any) -> float:
        clock.now += 10
        pool._take(one, worker_pb2.WorkerState(**state))
        return one.rate_told_s

    first = told(worker_id="x", prefill_tokens_per_s=5)
    assert first == clock.now
    assert told(worker_id="x", prefill_tokens_per_s=5) == first
    one.state = None
    assert told(worker_id="x", prefill_tokens_per_s=5) == first
    assert told(worker_id="x", prefill_tokens_per_s=6) == clock.now
    assert told(worker_id="y", prefill_tokens_per_s=6) == clock.now
