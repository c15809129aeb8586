"""Callers share one attempt to connect, and one transport comes of it."""

import asyncio

import pytest

from splitserve.errors import LeaseEnded, Unavailable
from splitserve.kv.copier import Copier
from splitserve.kv.layout import KvLayout, Lease
from splitserve.kv.runs import StoreRuns
from splitserve.kv.transports.shm import ShmTransport
from splitserve.v1 import kvstore_pb2


class StubTransport:
    name = "shm"

    def __init__(self, epoch):
        self.epoch = epoch
        self.closed = False

    def close(self):
        self.closed = True


class StubStore:
    """A control whose store is at `epoch`, and opens transports only when it may."""

    address = "store:1"

    def __init__(self):
        self.stub = self
        self.epoch = 1
        self.asked = 0
        self.opening, self.may_open = asyncio.Event(), asyncio.Event()
        self.transports = []

    async def Connect(self, request, timeout):
        self.asked += 1
        return kvstore_pb2.ConnectResponse(epoch=self.epoch, handle_socket="there")

    async def open(self, handle_socket, *, epoch, copier):
        self.opening.set()
        await self.may_open.wait()
        self.transports.append(StubTransport(epoch))
        return self.transports[-1]


@pytest.fixture
async def store(monkeypatch):
    store = StubStore()
    monkeypatch.setattr(ShmTransport, "open", store.open)
    return store


@pytest.fixture
async def runs(store):
    copier = Copier(threads=1)
    runs = StoreRuns(
        store,
        copier,
        worker_id="w",
        layout=KvLayout(b"m" * 32, 16, 4096),
        choice="auto",
        rpc_timeout_s=5.0,
    )
    yield runs
    await runs.close()
    copier.close()


async def test_callers_who_give_up_do_not_end_the_attempt(store, runs):
    for _ in range(3):
        caller = asyncio.ensure_future(runs.connect())
        await store.opening.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
    store.may_open.set()
    await runs.connect()
    assert store.asked == 1
    assert [transport.closed for transport in store.transports] == [False]
    assert runs.present.transport is store.transports[0]
    await runs.close()
    assert store.transports[0].closed


async def test_closing_ends_an_attempt(store, runs):
    caller = asyncio.ensure_future(runs.connect())
    await store.opening.wait()
    await runs.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert store.transports == []
    with pytest.raises(Unavailable):
        _ = runs.present


async def test_what_an_attempt_raises_reaches_everyone_and_is_tried_again(store, runs, monkeypatch):
    async def refuse(*_, **__):
        raise Unavailable("not there")

    with monkeypatch.context() as patch:
        patch.setattr(store, "Connect", refuse)
        results = await asyncio.gather(*(runs.connect() for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable] * 3
    store.may_open.set()
    await runs.connect()
    assert runs.present.epoch == 1


async def test_a_lease_of_a_run_that_began_during_the_attempt(store, runs):
    store.may_open.set()
    await runs.connect()
    store.may_open.clear()
    store.opening.clear()
    store.epoch = 2
    first = asyncio.ensure_future(runs.of(Lease("a", 2, "store:1")))
    await store.opening.wait()
    store.epoch = 3
    second = asyncio.ensure_future(runs.of(Lease("b", 3, "store:1")))
    await asyncio.sleep(0)
    store.may_open.set()
    assert (await second).epoch == 3
    await asyncio.wait([first])
    with pytest.raises(LeaseEnded):
        await runs.of(Lease("a", 2, "store:1"))
    assert [transport.closed for transport in store.transports] == [True, True, False]


async def test_a_store_lost_during_the_attempt_is_asked_again(store, runs):
    attempt = asyncio.ensure_future(runs.connect())
    await store.opening.wait()
    runs.lost()
    store.may_open.set()
    await attempt
    assert store.asked == 1
    run = await runs.of(Lease("a", 1, "store:1"))
    assert store.asked == 2
    assert run.transport is store.transports[1]
    assert [transport.closed for transport in store.transports] == [True, False]
    assert await runs.of(Lease("a", 1, "store:1")) is run
    assert store.asked == 2
