"""Ends what has run out, on time, and tells the metrics how things stand."""

from __future__ import annotations

import asyncio

from services.kvstore.store import Store
from splitserve.obs.metrics import Metrics

SWEEP_S = 0.1
"""With WRITE_GRACE_S this stays under the second that anything may outlive its lease."""


class Sweeper:
    """Sweeps the store ten times a second for as long as `run` runs."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._expired = 0
        self._evicted = 0

    async def run(self) -> None:
        """Until cancelled. An error ends it, and with it the service: see `__main__`."""
        while True:
            self._store.sweep()
            self._report()
            await asyncio.sleep(SWEEP_S)

    def _report(self) -> None:
        stats, metrics = self._store.stats(), self._metrics
        metrics.kvstore_live_leases.set(stats.live_leases)
        metrics.kvstore_used_bytes.set(stats.used_bytes)
        metrics.kvstore_arena_bytes.set(stats.arena_bytes)
        metrics.kvstore_blocks.labels("committed").set(stats.committed_blocks)
        metrics.kvstore_blocks.labels("reserved").set(stats.reserved_blocks)
        metrics.kvstore_blocks.labels("held").set(stats.held_blocks)
        metrics.kvstore_leases_expired.inc(stats.expired_leases - self._expired)
        metrics.kvstore_evictions.inc(stats.evicted_blocks - self._evicted)
        self._expired, self._evicted = stats.expired_leases, stats.evicted_blocks
