"""Which pools a reader has mapped, which it could not map, and which it has not heard of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.errors import BlockNotFound
from splitserve.kv import peer_pools
from splitserve.kv.copier import Copier
from splitserve.kv.peer_pools import PeerPools
from splitserve.v1 import kvstore_pb2


class Peer:
    def __init__(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


class Pages:
    """Handles are opened, but those that start with "bad"."""

    pool_domain = "test"

    def __init__(self) -> None:
        self.peers: dict[bytes, Peer] = {}

    def open_peer(self, handle: bytes) -> Peer:
        if handle.startswith(b"bad"):
            raise ConnectionError("not from here")
        return self.peers.setdefault(handle, Peer())


class Store:
    """A stub whose stream names what it is told to; None breaks it off."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[dict[int, bytes] | None] = asyncio.Queue()

    def WatchPools(self, request: kvstore_pb2.WatchPoolsRequest) -> Store:
        assert request.domain == "test"
        return self

    async def __aiter__(self) -> AsyncIterator[kvstore_pb2.WatchPoolsResponse]:
        while (named := await self.news.get()) is not None:
            yield kvstore_pb2.WatchPoolsResponse(
                pools=[kvstore_pb2.Pool(pool_id=i, handle=handle) for i, handle in named.items()]
            )

    def cancel(self) -> bool:
        return True


class Rig:
    def __init__(self) -> None:
        self.pages, self.store, self.copier = Pages(), Store(), Copier(1)
        self.pools = PeerPools(self.store, self.pages, self.copier)  # type: ignore[arg-type]

    def name(self, **handles: bytes) -> None:
        self.store.news.put_nowait({int(name[1:]): handle for name, handle in handles.items()})


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    rig.pools.start()
    yield rig
    await rig.pools.close()
    rig.copier.close()
    assert not any(peer.is_open for peer in rig.pages.peers.values())


async def test_a_pool_is_reached_once_it_is_mapped(rig: Rig) -> None:
    reached = asyncio.ensure_future(rig.pools.reaches(1))
    rig.name(p1=b"one")
    assert await reached
    assert (rig.pools.mapped, rig.pools.unmapped) == ([1], [])


async def test_only_what_could_not_be_opened_is_unmapped(rig: Rig) -> None:
    rig.name(p1=b"one", p2=b"bad")
    assert await asyncio.gather(rig.pools.reaches(1), rig.pools.reaches(2)) == [True, False]
    assert (rig.pools.mapped, rig.pools.unmapped) == ([1], [2])
    rig.name(p3=b"three")
    assert await rig.pools.reaches(3)
    assert (rig.pools.mapped, rig.pools.unmapped) == ([3], [])


async def test_a_pool_that_is_named_late_is_reached_then(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as at_once:
        at_once.setattr(peer_pools, "_NAMED_WITHIN_S", 0.0)
        assert not await rig.pools.reaches(1)
    assert rig.pools.unmapped == [], "it was not tried"
    rig.name(p1=b"one")
    assert await rig.pools.reaches(1)
    assert rig.pools.mapped == [1]


async def test_what_failed_is_tried_anew_when_it_is_named_anew(rig: Rig) -> None:
    rig.name(p1=b"bad")
    assert not await rig.pools.reaches(1)
    assert rig.pools.unmapped == [1]
    rig.store.news.put_nowait(None)
    rig.name(p1=b"good")
    while rig.pools.unmapped:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await rig.pools.reaches(1)
    assert (rig.pools.mapped, rig.pools.unmapped) == ([1], [])


async def test_a_pool_in_use_is_unmapped_after_it(rig: Rig) -> None:
    rig.name(p1=b"one")
    assert await rig.pools.reaches(1)
    async with rig.pools.lent(1):
        rig.name(p2=b"two")
        assert await rig.pools.reaches(2)
        assert rig.pools.mapped == [2]
        assert rig.pages.peers[b"one"].is_open
        with pytest.raises(BlockNotFound):
            async with rig.pools.lent(1):
                pass
