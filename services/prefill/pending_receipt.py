"""A hand-over's receipt, from its first sealed block until it can be given away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from splitserve.kv.pool_sharing import PoolShare
from splitserve.kv.receipt import KvReceipt


class PendingReceipt:
    """Gathers what was sealed in the pool. Used on the event loop that it is made on."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int, bytes]] = {}
        self._done: asyncio.Future[KvReceipt | None] = asyncio.get_running_loop().create_future()

    def add(self, blocks: Iterable[tuple[int, int, bytes]]) -> None:
        """Notes (index, page, digest) of whole blocks."""
        self._blocks.update((index, (page, digest)) for index, page, digest in blocks)

    def finish(self, share: PoolShare | None) -> None:
        """All that will stay in the pool was added; None: what was added does not count."""
        if self._done.done():
            return
        if share is None or not self._blocks:
            self._done.set_result(None)
        else:
            self._done.set_result(KvReceipt(share.pool_id, share.share_id, dict(self._blocks)))

    @property
    def is_complete(self) -> bool:
        """Whether there is a receipt for whoever asks."""
        return self._done.done() and self._done.result() is not None

    async def given(self, within_s: float) -> KvReceipt | None:
        """The receipt, or None if there is none within the time."""
        done, _ = await asyncio.wait([self._done], timeout=within_s)
        return self._done.result() if done else None
