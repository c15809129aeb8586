"""The pools of workers that others may map, and what their workers must be told.

The store never looks into a pool. It passes its handle on to who may map it, knows which blocks are
in which page, and tells the worker when a page is not needed any more or when a block of it is
wanted by someone who cannot map it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from services.kvstore.block import Block, PoolPlace
from splitserve.errors import Overloaded

_MAX_POOLS = 1024

SharedKey = tuple[bytes, int]
"""A block's key and its worker's share id."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Which pools a reader can map: those of a domain but some. An empty domain has none."""

    domain: str = ""
    unmapped: frozenset[int] = frozenset()


class Pool:
    """One pool. `changes` is for the stream of its worker."""

    def __init__(self, domain: str, handle: bytes) -> None:
        self.pool_id = secrets.randbits(63) | 1
        self.domain = domain
        self.handle = handle
        self._gone: list[SharedKey] = []
        self._wanted: list[SharedKey] = []
        self._closed = False
        self._news = asyncio.Event()

    def gone(self, key: bytes, place: PoolPlace) -> None:
        """Nobody reads the block from its page any more."""
        self._gone.append((key, place.share_id))
        self._news.set()

    def wanted(self, key: bytes, place: PoolPlace) -> None:
        """Someone who cannot map the pool waits for the block."""
        self._wanted.append((key, place.share_id))
        self._news.set()

    def close(self) -> None:
        """Ends `changes`."""
        self._closed = True
        self._news.set()

    async def changes(self) -> AsyncIterator[tuple[list[SharedKey], list[SharedKey]]]:
        """(gone, wanted) since the last time, until the pool is closed."""
        while not self._closed:
            await self._news.wait()
            self._news.clear()
            gone, wanted = self._gone, self._wanted
            self._gone, self._wanted = [], []
            if gone or wanted:
                yield gone, wanted


class Pools:
    """The pools that are shared now."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def __contains__(self, pool_id: int) -> bool:
        return pool_id in self._pools

    def add(self, domain: str, handle: bytes) -> Pool:
        """Registers a pool. Raises Overloaded when there are too many."""
        if len(self._pools) >= _MAX_POOLS:
            raise Overloaded(f"{_MAX_POOLS} pools are shared", retry_after_s=1.0)
        pool = Pool(domain, handle)
        self._pools[pool.pool_id] = pool
        self._tell()
        return pool

    def remove(self, pool: Pool) -> None:
        """Forgets a pool."""
        del self._pools[pool.pool_id]
        self._tell()

    def close(self) -> None:
        """Ends all `changes` and `watch`es: the store stops."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        self._tell()

    def reaches(self, reach: Reach, place: PoolPlace | None) -> bool:
        """Whether a reader gets at a block at `place`; at None it is in the arena."""
        return place is None or self.may_map(reach, place.pool_id)

    def may_map(self, reach: Reach, pool_id: int) -> bool:
        """Whether a reader can map a pool."""
        pool = self._pools.get(pool_id)
        return pool is not None and pool.domain == reach.domain and pool_id not in reach.unmapped

    def gone(self, block: Block) -> None:
        """See `Pool.gone`. A block that is in no pool is no pool's concern."""
        if block.pool is not None and block.pool.pool_id in self._pools:
            self._pools[block.pool.pool_id].gone(block.key, block.pool)

    def wanted(self, block: Block) -> None:
        """See `Pool.wanted`."""
        if block.pool is not None and block.pool.pool_id in self._pools:
            self._pools[block.pool.pool_id].wanted(block.key, block.pool)

    async def watch(self, domain: str) -> AsyncGenerator[list[Pool]]:
        """All pools of a domain, now and after each change."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while not self._closed:
                yield [pool for pool in self._pools.values() if pool.domain == domain]
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    def _tell(self) -> None:
        for changed in self._watchers:
            changed.set()
