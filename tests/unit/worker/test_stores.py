from __future__ import annotations

import asyncio

import pytest

from splitserve.errors import Unavailable
from splitserve.kv.layout import Lease
from splitserve.worker import stores as module
from splitserve.worker.stores import Stores

HOME, OTHER = "home:1", "other:1"
ADVERTISED = "node-7:1"


class StubClient:
    transport_name = "stub"

    def __init__(self, address: str) -> None:
        self.advertised_address = ADVERTISED if address == HOME else address
        self.have: set[bytes] = set()
        self.closed = False
        self.reachable = True

    def publish(self, added, removed) -> None:
        self.have |= set(added)
        self.have -= set(removed)

    async def close(self) -> None:
        self.closed = True


class Network:
    """Which stores are up; every connection that was made."""

    def __init__(self, *up: str) -> None:
        self.up = set(up)
        self.clients: list[StubClient] = []
        self.attempts = 0
        self.connected = asyncio.Event()

    async def connect(self, address: str) -> StubClient:
        self.attempts += 1
        await asyncio.sleep(0)
        if address not in self.up:
            raise Unavailable("refused")
        self.clients.append(StubClient(address))
        self.connected.set()
        return self.clients[-1]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch) -> None:
    monkeypatch.setattr(module, "HOME_RETRY_S", 0.01)


async def test_what_the_pool_gained_before_the_store_came_is_published() -> None:
    network = Network()
    stores = Stores(HOME, network.connect)
    stores.start()
    stores.publish([b"a", b"b"], [])
    stores.publish([b"c"], [b"a"])
    with pytest.raises(Unavailable):
        await stores.open(Lease("l", 1, HOME))
    network.up.add(HOME)
    await asyncio.wait_for(network.connected.wait(), 5)
    home = await stores.open(Lease("l", 1, HOME))
    assert home.have == {b"b", b"c"}
    stores.publish([b"d"], [b"b"])
    assert home.have == {b"c", b"d"}
    await stores.close()
    assert home.closed


async def test_each_store_is_connected_once_and_only_home_hears_of_the_pool() -> None:
    network = Network(HOME, OTHER)
    stores = Stores(HOME, network.connect)
    stores.start()
    opened = await asyncio.gather(*(stores.open(Lease("l", 1, OTHER)) for _ in range(5)))
    assert len(set(map(id, opened))) == 1
    home = await stores.open(Lease("l", 1, ""))
    assert await stores.open(Lease("l", 1, ADVERTISED)) is home
    assert stores.home_address == ADVERTISED
    stores.publish([b"a"], [])
    assert home.have == {b"a"}
    assert opened[0].have == set()
    assert network.attempts == 2
    await stores.close()
    assert all(client.closed for client in network.clients)


async def test_the_home_address_is_told_only_while_the_store_is_in_reach() -> None:
    network = Network(HOME)
    stores = Stores(HOME, network.connect)
    assert stores.home_address == ""
    home = await stores.open(Lease("l", 1, ""))
    assert stores.home_address == ADVERTISED
    home.reachable = False
    assert stores.home_address == ""
    assert await stores.open(Lease("l", 1, ADVERTISED)) is home
    home.reachable = True
    assert stores.home_address == ADVERTISED
    await stores.close()


async def test_who_gives_up_leaves_the_connection_to_the_others():
    network = Network(HOME, OTHER)
    stores = Stores(HOME, network.connect)
    lease = Lease("lease", 1, OTHER)
    impatient = asyncio.create_task(stores.open(lease))
    patient = asyncio.create_task(stores.open(lease))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).advertised_address == OTHER
    assert network.attempts == 1
    await stores.close()
    assert [client.closed for client in network.clients] == [True]
