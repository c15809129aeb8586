"""The store: leases, blocks, those who await them, and the arena, as one thing.

A block's life: a worker reserves it under a lease, writes its bytes into the arena (itself, or
through `write`), and commits it with its digest. Another awaits it under the same or another
lease, copies it out and checks the copy. When the leases have ended a full block stays at rest
until the space is needed; a partial one goes at once.

Every method is synchronous and atomic, and runs on the one event loop of the service. Nothing is
persistent: after a restart the epoch is new, so every earlier lease is refused and every earlier
block is gone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.kvstore.arena import Arena
from services.kvstore.awaiters import Awaiter, Awaiters
from services.kvstore.block import Block, Reserved
from services.kvstore.blocks import BlockTable
from services.kvstore.leases import Clock, LeaseRecord, Leases, new_epoch
from services.kvstore.space import Space
from splitserve.errors import BlockOutOfRange, InvalidRequest
from splitserve.kv.layout import MAX_PART_BYTES, BlockSpec, KvLayout, Lease

_MAX_GEOMETRIES = 256


@dataclass(frozen=True)
class StoreLimits:
    """Bounds on what callers can make the store remember."""

    max_leases: int = 16384
    max_lease_ttl_ms: int = 60_000
    max_awaiting_calls: int = 16384
    max_awaited_keys: int = 1_000_000


@dataclass(frozen=True)
class StoreStats:
    """Counts at one moment; see GetStatsResponse."""

    epoch: int
    live_leases: int
    committed_blocks: int
    reserved_blocks: int
    held_blocks: int
    used_bytes: int
    arena_bytes: int
    expired_leases: int
    evicted_blocks: int
    awaiting_calls: int


class BlockWatcher(Protocol):
    """Is told which full blocks can be read here."""

    def added(self, key: bytes) -> None:
        """The block became readable."""

    def removed(self, key: bytes) -> None:
        """The block is gone."""


class Store:
    """All state of one run of the service."""

    def __init__(
        self,
        arena: Arena,
        *,
        limits: StoreLimits,
        clock: Clock = time.monotonic,
        watcher: BlockWatcher | None = None,
    ) -> None:
        self._arena = arena
        self._watcher = watcher
        self._leases = Leases(
            epoch=new_epoch(),
            max_live=limits.max_leases,
            max_ttl_ms=limits.max_lease_ttl_ms,
            clock=clock,
        )
        self._space = Space(arena.size_bytes)
        self._blocks = BlockTable(
            self._space,
            clock=clock,
            may_rest=self._is_full,
            on_committed=self._committed,
            on_dropped=self._dropped,
        )
        self._awaiters = Awaiters(
            max_calls=limits.max_awaiting_calls, max_keys=limits.max_awaited_keys
        )
        # (block bytes, block tokens) that workers introduced, the latest last.
        self._geometries: OrderedDict[tuple[int, int], None] = OrderedDict()

    @property
    def epoch(self) -> int:
        """Unique to this run."""
        return self._leases.epoch

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.size_bytes

    def introduce(self, layout: KvLayout) -> None:
        """Learns which blocks are full ones. Raises InvalidRequest for an impossible size."""
        if not 0 < layout.block_bytes <= self.arena_bytes:
            raise InvalidRequest.single(
                "kv_layout.block_bytes", f"must be in 1..{self.arena_bytes}, the store's size"
            )
        if layout.block_tokens == 0:
            raise InvalidRequest.single("kv_layout.block_tokens", "must be at least 1")
        geometry = layout.block_bytes, layout.block_tokens
        self._geometries[geometry] = None
        self._geometries.move_to_end(geometry)
        if len(self._geometries) > _MAX_GEOMETRIES:
            self._geometries.popitem(last=False)

    def grant(self, owner: str, ttl_ms: int) -> LeaseRecord:
        """A new lease."""
        return self._leases.grant(owner, ttl_ms)

    def renew(self, leases: Iterable[Lease], ttl_ms: int) -> list[str]:
        """Extends leases; names those that have ended."""
        return [
            lease.lease_id
            for lease in leases
            if not self._leases.renew(lease.lease_id, lease.epoch, ttl_ms)
        ]

    def release(self, leases: Iterable[Lease]) -> None:
        """Ends leases now."""
        for lease in leases:
            if self._leases.release(lease.lease_id, lease.epoch):
                self._end(lease.lease_id)

    def sweep(self) -> None:
        """Ends what has run out. To be called several times a second."""
        for lease_id in self._leases.expire():
            self._end(lease_id)
        self._blocks.reclaim()

    def reserve(self, lease: Lease, specs: Sequence[BlockSpec]) -> list[Reserved]:
        """See `BlockTable.reserve`."""
        self._check(lease)
        return self._blocks.reserve(lease.lease_id, specs)

    def write(self, lease: Lease, key: bytes, offset_bytes: int, data: bytes) -> None:
        """Writes a part of a reserved block. Raises LeaseEnded, BlockOutOfRange."""
        self._check(lease)
        block = self._blocks.writable(lease.lease_id, key)
        if offset_bytes + len(data) > block.size_bytes:
            raise BlockOutOfRange(
                f"part [{offset_bytes}, {offset_bytes + len(data)}) of a block of "
                f"{block.size_bytes} bytes"
            )
        self._arena.write(block.extent.offset + offset_bytes, data)

    def commit(self, lease: Lease, digests: Sequence[tuple[bytes, bytes]]) -> None:
        """Makes (key, digest) blocks visible and wakes those who await them."""
        self._check(lease)
        self._blocks.commit(lease.lease_id, digests)

    def abandon(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Gives up reserved blocks; those who await them are told that they are missing."""
        self._check(lease)
        self._blocks.abandon(lease.lease_id, keys)

    def drop_damaged(self, lease: Lease, digests: Iterable[tuple[bytes, bytes]]) -> int:
        """Gives up (key, digest) blocks that a reader found damaged. How many were."""
        self._check(lease)
        return sum(
            self._blocks.drop_damaged(lease.lease_id, key, digest) for key, digest in digests
        )

    def start_await(self, lease: Lease, keys: Sequence[bytes], wait_for_writer: bool) -> Awaiter:
        """Begins to wait. The caller iterates the awaiter and ends with `stop_await`."""
        self._check(lease)
        awaiter = Awaiter(lease.lease_id, keys)
        self._awaiters.add(awaiter)
        for key in list(awaiter.pending):
            block = self._blocks.hold(lease.lease_id, key)
            if block is not None and block.committed:
                self._awaiters.decide(awaiter, key, block)
            elif block is None and not wait_for_writer:
                self._awaiters.decide(awaiter, key, None)
        return awaiter

    def stop_await(self, awaiter: Awaiter) -> None:
        """Ends a wait, decided or not. What it holds stays held until the lease ends."""
        self._awaiters.remove(awaiter)

    def block_size(self, lease: Lease, key: bytes) -> int:
        """Bytes of a block that the lease holds. Raises LeaseEnded, BlockNotFound."""
        self._check(lease)
        return self._blocks.readable(lease.lease_id, key).size_bytes

    def read_part(self, lease: Lease, key: bytes, offset_bytes: int) -> bytes:
        """At most MAX_PART_BYTES of a block that the lease holds, from `offset_bytes` on."""
        self._check(lease)
        block = self._blocks.readable(lease.lease_id, key)
        size = min(MAX_PART_BYTES, block.size_bytes - offset_bytes)
        return self._arena.read(block.extent.offset + offset_bytes, size)

    def prefix_length(self, keys: Sequence[bytes]) -> int:
        """How many of a chain's blocks are readable here, counted from the first."""
        return self._blocks.prefix_length(keys)

    def stats(self) -> StoreStats:
        """Counts."""
        return StoreStats(
            epoch=self.epoch,
            live_leases=len(self._leases),
            committed_blocks=self._blocks.num_committed,
            reserved_blocks=self._blocks.num_reserved,
            held_blocks=self._blocks.num_held,
            used_bytes=self._space.used_bytes,
            arena_bytes=self.arena_bytes,
            expired_leases=self._leases.num_expired,
            evicted_blocks=self._blocks.num_evicted,
            awaiting_calls=len(self._awaiters),
        )

    def _check(self, lease: Lease) -> None:
        self._leases.check(lease.lease_id, lease.epoch)

    def _end(self, lease_id: str) -> None:
        # The lease's own calls first: they are told that it ended, not that blocks are missing.
        self._awaiters.end_lease(lease_id)
        self._blocks.end_lease(lease_id)

    def _is_full(self, spec: BlockSpec) -> bool:
        return (spec.size_bytes, spec.num_tokens) in self._geometries

    def _committed(self, block: Block) -> None:
        for awaiter in self._awaiters.of(block.key):
            self._blocks.hold(awaiter.lease_id, block.key)
            self._awaiters.decide(awaiter, block.key, block)
        if block.may_rest and self._watcher is not None:
            self._watcher.added(block.key)

    def _dropped(self, block: Block) -> None:
        for awaiter in self._awaiters.of(block.key):
            self._awaiters.decide(awaiter, block.key, None)
        if block.committed and block.may_rest and self._watcher is not None:
            self._watcher.removed(block.key)
