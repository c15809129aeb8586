"""The store: leases, blocks, those who await them, and the arena, as one thing.

A block's life: a worker reserves it under a lease, writes its bytes into the arena (itself, or
through `write`), and commits it with its digest. Another awaits it under the same or another
lease, copies it out and checks the copy. When the leases have ended a full block stays at rest
until the space is needed; a partial one goes at once.

A worker that shares its pool may commit a block where it is. Who can map the pool reads it there;
for anyone else its worker is asked to write it to the arena.

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
from services.kvstore.block import Block, PoolPlace, Reserved
from services.kvstore.blocks import BlockTable
from services.kvstore.leases import Clock, LeaseRecord, Leases, new_epoch
from services.kvstore.pools import Pool, Pools, Reach
from services.kvstore.space import Extent, Space
from splitserve.errors import BlockNotFound, BlockOutOfRange, InvalidRequest
from splitserve.kv.layout import (
    MAX_PART_BYTES,
    BlockSpec,
    KvLayout,
    Lease,
    PartialBlock,
    PoolPage,
)

_MAX_GEOMETRIES = 256
_NOWHERE = Reach()


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
        self.pools = Pools()
        self._blocks = BlockTable(
            self._space,
            clock=clock,
            may_rest=self._is_full,
            on_committed=self._committed,
            on_dropped=self._dropped,
            on_moved=self.pools.gone,
            on_stuck=self._stuck,
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

    def share_pool(self, domain: str, handle: bytes) -> Pool:
        """Registers a pool until `unshare_pool`."""
        return self.pools.add(domain, handle)

    def unshare_pool(self, pool: Pool) -> None:
        """The pool is gone, and all blocks in it."""
        self._blocks.drop_pool(pool.pool_id)
        self.pools.remove(pool)

    def reserve(self, lease: Lease, specs: Sequence[BlockSpec], pool_id: int = 0) -> list[Reserved]:
        """See `BlockTable.reserve`. Blocks may stay in the pool, unless it is not shared now, or
        someone who waits for them cannot map it.
        """
        self._check(lease)

        def in_pool(key: bytes) -> bool:
            waiting = self._awaiters.of(key)
            return all(self.pools.may_map(awaiter.reach, pool_id) for awaiter in waiting)

        if pool_id not in self.pools:
            return self._blocks.reserve(lease.lease_id, specs)
        return self._blocks.reserve(lease.lease_id, specs, in_pool)

    def write(self, lease: Lease, key: bytes, offset_bytes: int, data: bytes) -> None:
        """Writes a part of a reserved block. Raises LeaseEnded, BlockOutOfRange."""
        self._check(lease)
        block = self._blocks.writable(lease.lease_id, key)
        if offset_bytes + len(data) > block.size_bytes:
            raise BlockOutOfRange(
                f"part [{offset_bytes}, {offset_bytes + len(data)}) of a block of "
                f"{block.size_bytes} bytes"
            )
        if block.extent is None:
            raise InvalidRequest.single("key", "the block stays in a pool and has no space")
        self._arena.write(block.extent.offset + offset_bytes, data)

    def commit(self, lease: Lease, digests: Sequence[tuple[bytes, bytes]]) -> None:
        """Makes (key, digest) blocks visible and wakes those who await them."""
        self._check(lease)
        self._blocks.commit(lease.lease_id, digests)

    def share(self, lease: Lease, blocks: Sequence[tuple[bytes, bytes, PoolPage]]) -> None:
        """Makes (key, digest, page) blocks visible where they are in a pool."""
        self._check(lease)
        if any(page.pool_id not in self.pools for _, _, page in blocks):
            raise InvalidRequest.single("pool_id", "the pool is not shared now")
        self._blocks.share(
            lease.lease_id,
            [
                (key, digest, PoolPlace(page.pool_id, page.page, page.share_id, lease.lease_id))
                for key, digest, page in blocks
            ],
        )

    def report(self, lease: Lease, blocks: Sequence[PartialBlock]) -> None:
        """Tells those who await blocks in a pool how far these are."""
        self._check(lease)
        if any(block.pool_page.pool_id not in self.pools for block in blocks):
            raise InvalidRequest.single("pool_id", "the pool is not shared now")
        for partial in blocks:
            self._blocks.writable(lease.lease_id, partial.key).partial = partial
            for awaiter in self._awaiters.of(partial.key):
                self._tell(awaiter, partial)

    def let_go(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Ends a lease's hold on blocks in pools."""
        self._check(lease)
        self._blocks.let_go(lease.lease_id, keys)

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

    def start_await(
        self,
        lease: Lease,
        keys: Sequence[bytes],
        wait_for_writer: bool,
        reach: Reach = _NOWHERE,
    ) -> Awaiter:
        """Begins to wait. The caller iterates the awaiter and ends with `stop_await`."""
        self._check(lease)
        awaiter = Awaiter(lease.lease_id, keys, reach)
        self._awaiters.add(awaiter)
        for key in list(awaiter.pending):
            block = self._blocks.hold(lease.lease_id, key)
            if block is not None and block.committed:
                self._offer(awaiter, block)
            elif block is None and not wait_for_writer:
                self._awaiters.decide(awaiter, key, None)
            elif block is not None and block.partial is not None and block.extent is None:
                self._tell(awaiter, block.partial)
        return awaiter

    def stop_await(self, awaiter: Awaiter) -> None:
        """Ends a wait, decided or not. What it holds stays held until the lease ends."""
        self._awaiters.remove(awaiter)

    def block_size(self, lease: Lease, key: bytes) -> int:
        """Bytes of a block that the lease holds. Raises LeaseEnded, BlockNotFound."""
        self._check(lease)
        return self._in_arena(lease, key)[0].size_bytes

    def read_part(self, lease: Lease, key: bytes, offset_bytes: int) -> bytes:
        """At most MAX_PART_BYTES of a block that the lease holds, from `offset_bytes` on."""
        self._check(lease)
        block, extent = self._in_arena(lease, key)
        size = min(MAX_PART_BYTES, block.size_bytes - offset_bytes)
        return self._arena.read(extent.offset + offset_bytes, size)

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

    def _tell(self, awaiter: Awaiter, partial: PartialBlock) -> None:
        if self.pools.may_map(awaiter.reach, partial.pool_page.pool_id):
            awaiter.tell(partial)

    def _in_arena(self, lease: Lease, key: bytes) -> tuple[Block, Extent]:
        block = self._blocks.readable(lease.lease_id, key)
        if block.extent is None:
            raise BlockNotFound(f"block {key.hex()[:16]} is in a pool")
        return block, block.extent

    def _offer(self, awaiter: Awaiter, block: Block) -> None:
        """Answers an awaiter with a committed block, or has it brought within its reach."""
        if self.pools.reaches(awaiter.reach, block.pool):
            self._awaiters.decide(awaiter, block.key, block)
        elif block.pool is not None and self._leases.is_live(block.pool.lease_id):
            self.pools.wanted(block)
        else:
            self._awaiters.decide(awaiter, block.key, None)

    def _end(self, lease_id: str) -> None:
        # The lease's own calls first: they are told that it ended, not that blocks are missing.
        self._awaiters.end_lease(lease_id)
        self._blocks.end_lease(lease_id)

    def _is_full(self, spec: BlockSpec) -> bool:
        return (spec.size_bytes, spec.num_tokens) in self._geometries

    def _committed(self, block: Block) -> None:
        for awaiter in self._awaiters.of(block.key):
            self._blocks.hold(awaiter.lease_id, block.key)
            self._offer(awaiter, block)
        if block.may_rest and block.pool is None and self._watcher is not None:
            self._watcher.added(block.key)

    def _stuck(self, block: Block) -> None:
        # Whoever still waits for a block that is there cannot map its pool.
        for awaiter in self._awaiters.of(block.key):
            self._awaiters.decide(awaiter, block.key, None)

    def _dropped(self, block: Block) -> None:
        for awaiter in self._awaiters.of(block.key):
            self._awaiters.decide(awaiter, block.key, None)
        self.pools.gone(block)
        in_arena = block.committed and block.pool is None
        if in_arena and block.may_rest and self._watcher is not None:
            self._watcher.removed(block.key)
