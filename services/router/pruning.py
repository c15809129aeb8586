"""Forgets the addresses that no worker has or names any more, as pods come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.router.decode_client import DecodeLinks
from services.router.stores import Stores
from services.router.workers import WorkerPool

INTERVAL_S = 30.0


async def prune_forever(
    pools: Sequence[WorkerPool],
    links: DecodeLinks,
    stores: Stores,
    *,
    interval_s: float = INTERVAL_S,
) -> None:
    """Go on until cancelled. What a request still uses is left for a later round."""
    while True:
        await asyncio.sleep(interval_s)
        workers = [worker for pool in pools for worker in pool.known()]
        await links.prune(workers)
        await stores.prune({worker.store_address for worker in workers})
