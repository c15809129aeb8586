"""One service of each tier with the fake engine, and leases that last a second."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..suite import Service, Suite

LEASE_S = 1.0
AFTER_LEASE_S = LEASE_S + 1.0
"""Nothing outlives its lease by more than a second."""

ROUTER_FLAGS = (
    *("--skip-tokenizer-init", "--vocab-size", "1000"),
    *("--lease-ttl-ms", str(round(LEASE_S * 1000))),
)


@dataclass
class Tiers:
    """A suite's services by tier."""

    kvstore: Service
    prefill: Service
    decode: Service
    router: Service
    spare: list[Service]
    """Further decode workers."""

    @property
    def all(self) -> tuple[Service, ...]:
        return self.kvstore, self.prefill, self.decode, *self.spare, self.router

    def named(self, tier: str) -> Service:
        """The service of a tier."""
        return next(service for service in self.all if service.tier == tier)


async def start_tiers(
    suite: Suite,
    *worker_flags: str,
    decode_flags: tuple[str, ...] = (),
    router_flags: tuple[str, ...] = (),
    store_flags: tuple[str, ...] = (),
    num_decode: int = 1,
) -> Tiers:
    """All four, ready. `worker_flags` go to prefill and decode."""
    ports = [suite.free_port() for _ in range(2 + num_decode)]
    store_at, prefill_at, *decodes_at = (f"127.0.0.1:{port}" for port in ports)
    # At once: they find each other whichever is first, and it halves the wait.
    store, prefill, router, decode, *spare = await asyncio.gather(
        suite.kvstore(*store_flags, port=ports[0]),
        suite.prefill(store_at, *worker_flags, port=ports[1]),
        suite.router([prefill_at], decodes_at, *ROUTER_FLAGS, *router_flags),
        *(suite.decode(store_at, *worker_flags, *decode_flags, port=port) for port in ports[2:]),
    )
    return Tiers(store, prefill, decode, router, spare)
