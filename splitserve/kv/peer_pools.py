"""The reader's side of blocks in other workers' pools: which are mapped here.

The store names the pools of this engine's domain. Each is mapped as soon as it is known, so that
the first hand-over need not wait for that, and unmapped when its worker is gone: whoever maps a
device's memory keeps it from being given to anyone else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from splitserve.errors import BlockNotFound
from splitserve.kv.copier import Copier
from splitserve.kv.pages import PeerPool, SharesPages
from splitserve.kv.standing_stream import StandingStream
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

_NAMED_WITHIN_S = 1.0
"""A block may be announced a little before the pool that it is in."""

_log = logging.getLogger(__name__)


class _Mapped:
    """One pool: `peer` is there once it was opened and until it is closed."""

    def __init__(self, opening: asyncio.Task[PeerPool | None]) -> None:
        self.opening = opening
        self.users = 0
        self.dropped = False

    def outcome(self) -> bool | None:
        """Whether it could be opened; None while that is not known."""
        if not self.opening.done() or self.opening.cancelled():
            return None
        return self.opening.result() is not None


class PeerPools:
    """Pools that one store names, from `start` to `close`."""

    def __init__(
        self, stub: kvstore_pb2_grpc.KvStoreServiceStub, pages: SharesPages, copier: Copier
    ) -> None:
        self.domain = pages.pool_domain
        self._pages = pages
        self._copier = copier
        self._pools: dict[int, _Mapped] = {}
        self._named = asyncio.Condition()
        self._closing: set[asyncio.Task[None]] = set()
        request = kvstore_pb2.WatchPoolsRequest(domain=self.domain)
        self._stream = StandingStream(
            "pool-watch", lambda: stub.WatchPools(request), self._received, self._broken
        )

    @property
    def unmapped(self) -> list[int]:
        """Pools that are named, but could not be mapped."""
        return [pool_id for pool_id, one in self._pools.items() if one.outcome() is False]

    @property
    def mapped(self) -> list[int]:
        """Pools that can be read without a wait."""
        return [pool_id for pool_id, one in self._pools.items() if one.outcome()]

    def start(self) -> None:
        """Begins to map, on the running loop."""
        self._stream.start()

    async def close(self) -> None:
        """Unmaps everything once no copy uses it."""
        await self._stream.close()
        while self._closing:
            await asyncio.wait(self._closing)

    async def reaches(self, pool_id: int) -> bool:
        """Whether the pool is mapped, once that is decided. One that is not named within
        `_NAMED_WITHIN_S` is not, though it may be later; it is not among the `unmapped`.
        """
        mapped = await self._known(pool_id)
        return mapped is not None and await asyncio.shield(mapped.opening) is not None

    @asynccontextmanager
    async def lent(self, pool_id: int) -> AsyncIterator[PeerPool]:
        """The mapped pool; it stays mapped for as long. Raises BlockNotFound if it is gone."""
        mapped = self._pools.get(pool_id)
        peer = await asyncio.shield(mapped.opening) if mapped else None
        if mapped is None or peer is None or mapped.dropped:
            raise BlockNotFound("the worker that kept the block is gone")
        mapped.users += 1
        try:
            yield peer
        finally:
            mapped.users -= 1
            self._close_if_idle(mapped)

    async def _known(self, pool_id: int) -> _Mapped | None:
        if pool_id in self._pools:
            return self._pools[pool_id]
        try:
            async with asyncio.timeout(_NAMED_WITHIN_S), self._named:
                await self._named.wait_for(lambda: pool_id in self._pools)
        except TimeoutError:
            return None
        return self._pools.get(pool_id)

    def _received(self, news: kvstore_pb2.WatchPoolsResponse) -> None:
        named = {pool.pool_id: pool.handle for pool in news.pools}
        for pool_id in self._pools.keys() - named.keys():
            self._drop(pool_id)
        for pool_id in named.keys() - self._pools.keys():
            opening = asyncio.create_task(self._open(named[pool_id]), name="pool-open")
            self._pools[pool_id] = _Mapped(opening)
        self._later(self._tell())

    def _broken(self) -> None:
        for pool_id in list(self._pools):
            self._drop(pool_id)

    async def _open(self, handle: bytes) -> PeerPool | None:
        try:
            return await self._copier.run(self._pages.open_peer, handle)
        except OSError as error:
            _log.warning("another worker's pool cannot be mapped: %s", error)
        except Exception:
            _log.exception("another worker's pool cannot be mapped")
        return None

    async def _tell(self) -> None:
        async with self._named:
            self._named.notify_all()

    def _drop(self, pool_id: int) -> None:
        mapped = self._pools.pop(pool_id)
        mapped.dropped = True
        self._close_if_idle(mapped)

    def _close_if_idle(self, mapped: _Mapped) -> None:
        if mapped.dropped and not mapped.users:
            self._later(self._unmap(mapped))

    async def _unmap(self, mapped: _Mapped) -> None:
        peer = await mapped.opening
        if peer is not None:
            await self._copier.run(peer.close)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
