"""The blocks of the store: set aside, committed, held, at rest.

    absent --reserve--> reserved --commit--> committed, held --last hold ends--> at rest
      ^                    |                     ^                                 |
      |<--abandon, writer's lease ends           |<------------- hold -------------|
      |<----------------------------- evict, least recently used first ------------|

A block may be committed where it is in a worker's pool instead, and takes no space then. Reserved
anew by the lease that shared it, it becomes a reserved block with space, to be written there.

Invariants:
* a block has exactly one extent of the space, and no extent is in two blocks, unless it stays in a
  pool: then it has none;
* a reserved block has a writer, which is one of its holders; a committed one has a digest;
* a block is at rest if and only if it is committed and nobody holds it, and only such a block is
  evicted;
* a damaged block leaves the table at once, but its extent is free only when its last holder, who
  may be copying it, is gone;
* partial blocks never rest: no other prompt can have their key but the very same one, so they are
  dropped with their last hold. So are blocks in pools, and all of a pool when it is gone.

The table knows nothing of time to live, sockets or tasks; it is told of leases that end.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from services.kvstore.block import Block, PoolPlace, Reserved, ReserveOutcome
from services.kvstore.space import Extent, Space, round_up
from splitserve.errors import BlockNotFound, InvalidRequest, LeaseEnded, Overloaded
from splitserve.kv.layout import WRITE_GRACE_S, BlockSpec

BlockListener = Callable[[Block], None]


def _ignore(block: Block) -> None:
    """Tells nobody."""


def _never(key: bytes) -> bool:
    """No block stays in a pool."""
    return False


class BlockTable:
    """All blocks of one arena. Every method is atomic: it raises before it changes anything.

    `may_rest` tells whether a block is worth keeping when nobody holds it. `on_committed` and
    `on_dropped` are called after a block became visible and after it left the table, `on_moved`
    when a block in a pool is about to be written to the arena, and `on_stuck` when the lease that
    could have had it written there has ended, though others hold it.
    """

    def __init__(
        self,
        space: Space,
        *,
        clock: Callable[[], float],
        may_rest: Callable[[BlockSpec], bool],
        on_committed: BlockListener = _ignore,
        on_dropped: BlockListener = _ignore,
        on_moved: BlockListener = _ignore,
        on_stuck: BlockListener = _ignore,
    ) -> None:
        self._space = space
        self._clock = clock
        self._may_rest = may_rest
        self._on_committed = on_committed
        self._on_dropped = on_dropped
        self._on_moved = on_moved
        self._on_stuck = on_stuck
        self._blocks: dict[bytes, Block] = {}
        # Insertion order is the order a lease came to hold them in: a prompt's, front to back.
        self._held_by: dict[str, dict[bytes, None]] = {}
        # Damaged blocks that left the table, until the leases that hold them end.
        self._damaged_held_by: dict[str, list[Block]] = {}
        # Keys of what is committed in each pool.
        self._in_pool: dict[int, set[bytes]] = {}
        self._resting: OrderedDict[bytes, Block] = OrderedDict()
        self._resting_bytes = 0
        # (when it may be reused, extent), in order of time.
        self._quarantine: deque[tuple[float, Extent]] = deque()
        self.num_reserved = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    @property
    def num_committed(self) -> int:
        """Committed blocks, held or at rest."""
        return len(self._blocks) - self.num_reserved

    @property
    def num_held(self) -> int:
        """Blocks that a live lease holds; reserved ones are held by their writer."""
        return len(self._blocks) - len(self._resting)

    def reserve(
        self,
        lease_id: str,
        specs: Sequence[BlockSpec],
        in_pool: Callable[[bytes], bool] = _never,
    ) -> list[Reserved]:
        """Sets space aside for what is absent and holds the rest, all or nothing. What stays
        `in_pool` gets no space.

        A block that this lease reserved before is answered WRITE again, at the same place: the
        work was handed to another worker after the first was lost. So is one that it shared in a
        pool and that may not stay there.

        Raises Overloaded if the space is held, InvalidRequest if specs contradict each other or
        an earlier reservation.
        """
        self._check_specs(lease_id, specs)
        stays = {spec.key for spec in specs if in_pool(spec.key)}
        lacking = [spec for spec in specs if self._lacks_space(lease_id, spec.key, stays)]
        # Blocks asked for that are at rest must not be evicted to make room for the others.
        pinned = [spec.key for spec in specs if spec.key in self._resting]
        sizes = [spec.size_bytes for spec in lacking]
        allocated = self._allocate(sizes, keep=set(pinned))
        extents = {spec.key: extent for spec, extent in zip(lacking, allocated, strict=True)}
        answers = []
        for spec in specs:
            block = self._blocks.get(spec.key)
            if block is None:
                block = self._add(lease_id, spec, extents.get(spec.key))
                answers.append(Reserved(ReserveOutcome.WRITE, block))
                continue
            self._hold(lease_id, block)
            if spec.key in extents:
                self._give_space(lease_id, block, extents[spec.key])
            if block.committed:
                answers.append(Reserved(ReserveOutcome.PRESENT, block))
            elif block.writer == lease_id:
                answers.append(Reserved(ReserveOutcome.WRITE, block))
            else:
                answers.append(Reserved(ReserveOutcome.BEING_WRITTEN, block))
        return answers

    def writable(self, lease_id: str, key: bytes) -> Block:
        """The block, if it is reserved under the lease. Raises LeaseEnded."""
        block = self._blocks.get(key)
        if block is None or block.writer != lease_id:
            raise LeaseEnded(f"block {key.hex()[:16]} is not reserved under the lease")
        return block

    def commit(self, lease_id: str, digests: Sequence[tuple[bytes, bytes]]) -> None:
        """Makes reserved blocks visible, all or none. Committing one again with the same digest
        is no error. Raises LeaseEnded if one is not reserved under the lease.
        """
        fresh: dict[bytes, tuple[Block, bytes]] = {}
        for key, digest in digests:
            block = self._blocks.get(key)
            again = block is not None and block.committed and lease_id in block.holders
            if again and block is not None and block.digest == digest:
                continue
            fresh[key] = (self.writable(lease_id, key), digest)
        if any(block.extent is None for block, _ in fresh.values()):
            raise InvalidRequest.single("blocks", "must be in_pool, as no space was set aside")
        for block, digest in fresh.values():
            self._become_visible(block, digest)

    def share(self, lease_id: str, places: Sequence[tuple[bytes, bytes, PoolPlace]]) -> None:
        """Makes (key, digest, place) blocks visible where they are, all or none. Sharing one again
        with the same digest at the same place is no error. The errors are those of `commit`.
        """
        fresh: dict[bytes, tuple[Block, bytes, PoolPlace]] = {}
        for key, digest, place in places:
            block = self._blocks.get(key)
            again = block is not None and block.committed and lease_id in block.holders
            if again and block is not None and (block.digest, block.pool) == (digest, place):
                continue
            fresh[key] = (self.writable(lease_id, key), digest, place)
        if any(block.extent is not None for block, _, _ in fresh.values()):
            raise InvalidRequest.single("in_pool", "must be blocks, as there is space")
        for block, digest, place in fresh.values():
            block.pool = place
            self._in_pool.setdefault(place.pool_id, set()).add(block.key)
            readers = block.read_early
            self._become_visible(block, digest)
            for reader in readers & block.holders:
                self._unhold(reader, block)

    def abandon(self, lease_id: str, keys: Iterable[bytes]) -> None:
        """Drops those of `keys` that are reserved under the lease, or shared under it."""
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                continue
            if block.writer == lease_id or (block.pool and block.pool.lease_id == lease_id):
                self._drop(block)

    def drop_pool(self, pool_id: int) -> None:
        """Drops all that is in a pool."""
        for key in list(self._in_pool.get(pool_id, ())):
            self._drop(self._blocks[key])

    def let_go(self, lease_id: str, keys: Iterable[bytes]) -> None:
        """Ends the lease's hold on those of `keys` that are in pools: at once, or for a block whose
        commit is still on its way when it comes.
        """
        for key in keys:
            block = self._blocks.get(key)
            if block is None or lease_id not in block.holders:
                continue
            if block.pool is not None:
                self._unhold(lease_id, block)
            elif block.extent is None:
                block.read_early |= {lease_id}

    def drop_damaged(self, lease_id: str, key: bytes, digest: bytes) -> bool:
        """Takes a damaged block out of the table, so that its key can be reserved anew.

        False: the lease does not hold a committed block of this key and digest, and none is
        dropped; the report came late.
        """
        block = self._blocks.get(key)
        if block is None or not block.committed or block.digest != digest:
            return False
        if lease_id not in block.holders:
            return False
        self._unlink(block)
        for holder in block.holders:
            self._damaged_held_by.setdefault(holder, []).append(block)
        self._on_dropped(block)
        return True

    def hold(self, lease_id: str, key: bytes) -> Block | None:
        """Holds a block for the lease, reserved or committed. None: there is no such block."""
        block = self._blocks.get(key)
        if block is not None:
            self._hold(lease_id, block)
        return block

    def readable(self, lease_id: str, key: bytes) -> Block:
        """A committed block that the lease holds. Raises BlockNotFound."""
        block = self._blocks.get(key)
        if block is None or not block.committed or lease_id not in block.holders:
            raise BlockNotFound(f"block {key.hex()[:16]} is not held by the lease")
        return block

    def end_lease(self, lease_id: str) -> None:
        """Drops what the lease was writing and lets go of what it held.

        Back to front, so that of one prompt the tail is evicted before the prefix it hangs on.
        """
        for key in reversed(self._held_by.pop(lease_id, {})):
            block = self._blocks[key]
            block.holders.discard(lease_id)
            if block.writer == lease_id:
                self._drop(block)
            elif not block.holders:
                self._rest(block)
            elif block.pool and block.pool.lease_id == lease_id:
                self._on_stuck(block)
        for block in self._damaged_held_by.pop(lease_id, ()):
            block.holders.discard(lease_id)
            if not block.holders and block.extent:
                self._space.release(block.extent)

    def reclaim(self) -> None:
        """Frees quarantined space whose grace is over."""
        now = self._clock()
        while self._quarantine and self._quarantine[0][0] <= now:
            self._space.release(self._quarantine.popleft()[1])

    def prefix_length(self, keys: Sequence[bytes]) -> int:
        """How many of a chain's blocks are committed here, counted from the first."""
        for count, key in enumerate(keys):
            block = self._blocks.get(key)
            if block is None or not block.committed:
                return count
        return len(keys)

    def _check_specs(self, lease_id: str, specs: Sequence[BlockSpec]) -> None:
        if len({spec.key for spec in specs}) != len(specs):
            raise InvalidRequest.single("blocks", "a key is named twice")
        for spec in specs:
            if spec.size_bytes > self._space.arena_bytes:
                raise InvalidRequest.single("blocks.size_bytes", "larger than the store")
            block = self._blocks.get(spec.key)
            if (
                block is not None
                and block.writer == lease_id
                and block.size_bytes != spec.size_bytes
            ):
                raise InvalidRequest.single("blocks.size_bytes", "differs from the reservation")

    def _allocate(self, sizes: Sequence[int], keep: set[bytes]) -> list[Extent]:
        """One extent for each size, evicting what is needed; Overloaded and nothing otherwise."""
        needed = sum(map(round_up, sizes))
        kept = sum(self._blocks[key].arena_bytes for key in keep)
        # Checked first, so that a request that cannot be met costs no cached block.
        if needed > self._space.free_bytes + self._resting_bytes - kept:
            raise self._no_room(needed)
        extents: list[Extent] = []
        for size in sizes:
            extent = self._space.allocate(size)
            while extent is None:
                if not self._evict_one(keep):
                    for taken in extents:
                        self._space.release(taken)
                    raise self._no_room(needed)
                extent = self._space.allocate(size)
            extents.append(extent)
        return extents

    def _no_room(self, needed: int) -> Overloaded:
        return Overloaded(
            f"{needed} bytes wanted, {self._space.free_bytes} free, "
            f"{self._resting_bytes} at rest of {self._space.arena_bytes}",
            retry_after_s=WRITE_GRACE_S,
        )

    def _evict_one(self, keep: set[bytes]) -> bool:
        victim = next((block for key, block in self._resting.items() if key not in keep), None)
        if victim is None:
            return False
        self.num_evicted += 1
        self._drop(victim)
        return True

    def _lacks_space(self, lease_id: str, key: bytes, stays: set[bytes]) -> bool:
        """Whether the block must get space for this lease to write it."""
        block = self._blocks.get(key)
        if key in stays:
            return False
        if block is None:
            return True
        shared = block.pool is not None and block.pool.lease_id == lease_id
        return block.extent is None and (shared or block.writer == lease_id)

    def _give_space(self, lease_id: str, block: Block, extent: Extent) -> None:
        block.extent = extent
        if block.pool is not None:
            self._on_moved(block)
            self._leave_pool(block)
            block.pool, block.writer, block.digest = None, lease_id, b""
            self.num_reserved += 1

    def _unhold(self, lease_id: str, block: Block) -> None:
        block.holders.discard(lease_id)
        del self._held_by[lease_id][block.key]
        if not block.holders:
            self._rest(block)

    def _leave_pool(self, block: Block) -> None:
        if block.pool is not None:
            keys = self._in_pool[block.pool.pool_id]
            keys.discard(block.key)
            if not keys:
                del self._in_pool[block.pool.pool_id]

    def _become_visible(self, block: Block, digest: bytes) -> None:
        block.writer, block.digest = None, digest
        self.num_reserved -= 1
        self._on_committed(block)

    def _add(self, lease_id: str, spec: BlockSpec, extent: Extent | None) -> Block:
        block = Block(
            spec.key, extent, spec.size_bytes, spec.num_tokens, self._may_rest(spec), lease_id
        )
        self._blocks[spec.key] = block
        self.num_reserved += 1
        self._hold(lease_id, block)
        return block

    def _hold(self, lease_id: str, block: Block) -> None:
        if self._resting.pop(block.key, None) is not None:
            self._resting_bytes -= block.arena_bytes
        block.holders.add(lease_id)
        block.read_early -= {lease_id}
        self._held_by.setdefault(lease_id, {})[block.key] = None

    def _rest(self, block: Block) -> None:
        if not block.may_rest or block.pool is not None:
            self._drop(block)
            return
        self._resting[block.key] = block
        self._resting_bytes += block.arena_bytes

    def _drop(self, block: Block) -> None:
        """Takes a block out of the table and gives its space back, at once or after the grace."""
        self._unlink(block)
        if not block.committed:
            self.num_reserved -= 1
        if block.extent and block.committed:
            self._space.release(block.extent)
        elif block.extent:
            # Its writer may be in the middle of a copy that it began while the lease was live.
            # Nobody else gets the space until that copy must be over (see WRITE_GRACE_S).
            self._quarantine.append((self._clock() + WRITE_GRACE_S, block.extent))
        self._on_dropped(block)

    def _unlink(self, block: Block) -> None:
        del self._blocks[block.key]
        self._leave_pool(block)
        if self._resting.pop(block.key, None) is not None:
            self._resting_bytes -= block.arena_bytes
        for lease_id in block.holders:
            self._held_by.get(lease_id, {}).pop(block.key, None)
