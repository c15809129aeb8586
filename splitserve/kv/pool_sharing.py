"""The writer's side of blocks that stay in a worker's pool: what is shared, until when.

A stream registers the pool with the store for as long as it lives, and brings news of each block
that was shared: it is gone, and its page is free again; or it is wanted in the arena. When the
stream breaks, all is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from splitserve.kv.standing_stream import StandingStream
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

_log = logging.getLogger(__name__)


class ShareListener(Protocol):
    """Who keeps the pages. Called on the loop's thread; keys may be unknown by then."""

    def gone(self, keys: Iterable[bytes]) -> None:
        """Nobody reads these blocks from their pages any more."""

    def wanted(self, keys: Iterable[bytes]) -> None:
        """Someone who cannot map the pool waits for these blocks."""

    def lost(self) -> None:
        """All blocks of the share are gone."""


@dataclass(frozen=True)
class PoolShare:
    """Blocks that one listener keeps in the pool."""

    pool_id: int
    share_id: int


class PoolSharing:
    """One pool's registration with one store."""

    def __init__(
        self,
        stub: kvstore_pb2_grpc.KvStoreServiceStub,
        *,
        worker_id: str,
        domain: str,
        handle: bytes,
    ) -> None:
        request = kvstore_pb2.SharePoolRequest(worker_id=worker_id, domain=domain, handle=handle)
        self._stream = StandingStream(
            "pool-sharing", lambda: stub.SharePool(request), self._received, self._broken
        )
        self._pool_id = 0
        self._ids = count(1)
        self._listeners: dict[int, ShareListener] = {}

    def start(self) -> None:
        """Begins to share, on the running loop."""
        self._stream.start()

    async def close(self) -> None:
        """Ends the registration; every listener has lost its blocks."""
        await self._stream.close()

    def open(self, listener: ShareListener) -> PoolShare | None:
        """A share, to be closed; None while the store does not know the pool."""
        if not self._pool_id:
            return None
        share = PoolShare(self._pool_id, next(self._ids))
        self._listeners[share.share_id] = listener
        return share

    def close_share(self, share: PoolShare) -> None:
        """The listener wants no news any more."""
        self._listeners.pop(share.share_id, None)

    def _received(self, news: kvstore_pb2.SharePoolResponse) -> None:
        if news.pool_id:
            self._pool_id = news.pool_id
            _log.info("the pool is shared")
        for shared in news.gone:
            if listener := self._listeners.get(shared.share_id):
                listener.gone([shared.key])
        for shared in news.wanted:
            if listener := self._listeners.get(shared.share_id):
                listener.wanted([shared.key])

    def _broken(self) -> None:
        self._pool_id = 0
        listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            listener.lost()
