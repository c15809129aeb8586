"""Hands a prompt's blocks to the store while later layers are still being computed.

1. The core reports that pages are set aside; the blocks are reserved under the lease. A block that
   is there already, or that another is writing, is left to them.
2. Each group of layers that is complete is copied out of the pages into the store.
3. A block whose layers are all written is committed with the digest of what was copied, or of its
   page.
4. Whatever was not committed in the end is abandoned, so that who awaits it is told.

A block that may stay in the pool is left there (`pool_blocks`), unless someone who cannot map the
pool waits for it: then it goes the way of the others after all. So do blocks that are not whole yet
when the pool's registration is lost.

The engine's thread only posts what is ready. Copies and digests run in the copier's threads, one
round of them at a time: what becomes ready meanwhile is the next round. The compute waits for
none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from services.prefill.block import Block
from services.prefill.block_writer import BlockWriter, OpenStore
from services.prefill.pool_blocks import ASK_EVERY_S, PoolBlocks
from splitserve.engine.protocol import EngineSpec
from splitserve.errors import Overloaded, SplitserveError
from splitserve.kv.codec import BlockHasher
from splitserve.kv.layout import BlockSpec, Lease
from splitserve.kv.page_mover import all_ended
from splitserve.kv.pool_sharing import PoolShare
from splitserve.kv.receipt import KvReceipt

BLOCKS_PER_ROUND = 64
"""Bounds the memory of one round of copies that go through buffers."""

ABANDON_WITHIN_S = 0.5
"""So long pages are kept to tell a store that hangs what became of their blocks."""

_log = logging.getLogger(__name__)


@dataclass
class HandOverStats:
    """What was handed over, for the trace. Times are Unix nanoseconds, 0 for never; `first_ns`
    is when the first layers were at hand, `busy_ns` how long blocks were copied, digested or
    committed.
    """

    began_ns: int = 0
    first_ns: int = 0
    ended_ns: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    num_present: int = 0
    busy_ns: int = 0
    transport: str = ""
    lease_id: str = ""
    error: SplitserveError | None = None


class HandOver:
    """The `KvSink` of one prompt."""

    def __init__(
        self,
        lease: Lease,
        *,
        prompt_tokens: int,
        spec: EngineSpec,
        open_store: OpenStore,
        ask_every_s: float = ASK_EVERY_S,
    ) -> None:
        self._lease = lease
        self._prompt_tokens = prompt_tokens
        self._spec = spec
        self._open_store = open_store
        self._loop = asyncio.get_running_loop()
        # Of the request: what is called and logged here belongs to its trace.
        self._context = contextvars.copy_context()
        self._blocks: list[Block] = []
        self._pending: list[Block] = []
        self._news = asyncio.Event()
        self._pool = PoolBlocks(
            lease,
            num_layers=spec.num_layers,
            layer_group=spec.layer_group,
            news=self._news,
            ask_every_s=ask_every_s,
        )
        self._is_reserved = False
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None
        self.stats = HandOverStats(lease_id=lease.lease_id)

    # -- on the engine's thread ----------------------------------------------------------------

    def begin(self, keys: Seq[bytes], pages: Seq[int], num_cached_blocks: int) -> None:
        """See `KvSink.begin`."""
        self._loop.call_soon_threadsafe(self._begin, keys, pages, num_cached_blocks)

    def layers_done(
        self, first_block: int, end_block: int, first_layer: int, end_layer: int
    ) -> None:
        """See `KvSink.layers_done`."""
        self._loop.call_soon_threadsafe(self._mark_ready, first_block, end_block, end_layer)

    def blocks_done(self, first_block: int, end_block: int) -> None:
        """See `KvSink.blocks_done`."""
        layers = self._spec.num_layers
        self._loop.call_soon_threadsafe(self._mark_ready, first_block, end_block, layers)

    # -- on the event loop ---------------------------------------------------------------------

    def complete(self) -> None:
        """The prompt is computed: nothing more will be reported."""
        self._mark_ready(0, len(self._blocks), self._spec.num_layers)

    def cancel(self) -> None:
        """Commit nothing more. What is being copied is abandoned once no copy runs."""
        self._cancelled = True
        if self._task:
            self._task.cancel()

    async def receipt(self, within_s: float) -> KvReceipt | None:
        """What stays in the pool, once that is whole and digested. None: nothing does, or it is
        not within the time, or not reserved yet; the store will tell.
        """
        return await self._pool.receipt.given(within_s) if self._is_reserved else None

    async def ended(self) -> None:
        """Wait until nothing here touches a page any more, and nobody else reads one."""
        if self._task:
            await asyncio.wait([self._task])

    def _begin(self, keys: Seq[bytes], pages: Seq[int], num_cached_blocks: int) -> None:
        if self._cancelled:
            return
        block, layers = self._spec.block_tokens, self._spec.num_layers
        self._blocks = [
            Block(
                key=key,
                index=index,
                page=page,
                num_tokens=min(block, self._prompt_tokens - index * block),
                ready=layers if index < num_cached_blocks else 0,
            )
            for index, (key, page) in enumerate(zip(keys, pages, strict=False))
        ]
        self.stats.began_ns = time.time_ns()
        self._task = self._loop.create_task(self._run(), name="hand-over", context=self._context)

    def _mark_ready(self, first_block: int, end_block: int, end_layer: int) -> None:
        for block in self._blocks[first_block:end_block]:
            block.ready = max(block.ready, end_layer)
        self._news.set()

    async def _run(self) -> None:
        try:
            store = await self._open_store(self._lease)
            self._pool.share = store.open_share(self._pool)
            try:
                await self._reserve(store, self._blocks, self._pool.share)
                self._is_reserved = True
                if not any(block.stays for block in self._pending):
                    self._pool.receipt.finish(None)
                await self._hand_over_all(store)
            finally:
                await self._abandon_rest(store)
        except SplitserveError as error:
            self.stats.error = error
            _log.info("blocks are not handed over: %s", error.message)
        except Exception as error:
            self.stats.error = SplitserveError("the hand-over failed; the worker's log says why")
            _log.exception("the hand-over failed: %s", error)
        finally:
            self._pool.receipt.finish(None)
            self.stats.ended_ns = self.stats.ended_ns or time.time_ns()

    async def _reserve(
        self, store: BlockWriter, blocks: list[Block], share: PoolShare | None
    ) -> None:
        size, fingerprint = self._spec.block_bytes, store.layout.fingerprint
        specs = [BlockSpec(block.key, size, block.num_tokens) for block in blocks]
        reservations = await store.reserve(self._lease, specs, share)
        for block, reservation in zip(blocks, reservations, strict=True):
            if reservation.must_write:
                block.reservation, block.written = reservation, 0
                if not store.seals_pages:
                    block.hasher = BlockHasher(block.key, block.num_tokens, fingerprint, size)
                self._pending.append(block)
            else:
                block.settle()
                self.stats.num_present += 1
        in_pool = any(r.must_write and r.in_pool for r in reservations)
        self.stats.transport = "device" if in_pool else store.transport_name

    async def _hand_over_all(self, store: BlockWriter) -> None:
        """Until all blocks are committed and nobody reads a page of ours any more."""
        while self._pending or self._pool.kept or self._pool.wanted_blocks:
            self._news.clear()
            await self._bring_to_arena(store)
            due = [block for block in self._pending if block.written < block.ready]
            if due:
                self.stats.first_ns = self.stats.first_ns or time.time_ns()
                began = time.monotonic_ns()
                await self._write_round(store, due)
                self.stats.busy_ns += time.monotonic_ns() - began
                self._pending = [block for block in self._pending if block.reservation]
            elif self._pending:
                await self._news.wait()
            elif self._pool.kept:
                self.stats.error = await self._pool.outlast(store) or self.stats.error

    async def _bring_to_arena(self, store: BlockWriter) -> None:
        """Reserve anew, with space, what may not stay in the pool. What finds none is given up."""
        wanted = list(self._pool.wanted_blocks)
        astray = [] if self._pool.share else [block for block in self._pending if block.stays]
        if not (blocks := list(dict.fromkeys([*wanted, *astray]))):
            return
        moving = set(blocks)
        self._pending = [block for block in self._pending if block not in moving]
        try:
            await self._reserve(store, blocks, None)
        except Overloaded as error:
            self.stats.error = error
            _log.info("%d blocks find no room in the store: %s", len(blocks), error.message)
            await store.abandon(self._lease, [block.key for block in blocks])
            for block in blocks:
                block.settle()
        del self._pool.wanted_blocks[: len(wanted)]

    async def _write_round(self, store: BlockWriter, due: list[Block]) -> None:
        """Copy what is ready of each block, or leave it where it is, and commit what is whole."""
        staying = [block for block in due if block.stays]
        if staying:
            self._committed(await self._pool.leave(store, staying, self._pending))
        going = [block for block in due if block.reservation and not block.stays]
        if going:
            await self._write_to_arena(store, going[:BLOCKS_PER_ROUND])

    async def _write_to_arena(self, store: BlockWriter, blocks: list[Block]) -> None:
        parts = [block.next_part() for block in blocks]
        whole = [
            block
            for block, part in zip(blocks, parts, strict=True)
            if part.end_layer == self._spec.num_layers
        ]
        # A device digests its pages, whether they are written yet or not.
        sealed: list[bytes] = []
        await all_ended([store.put_pages(self._lease, parts), _seal(store, whole, sealed)])
        for block, part in zip(blocks, parts, strict=True):
            block.written = part.end_layer
        if whole:
            digests = sealed or [block.hasher.digest() for block in whole if block.hasher]
            keys = [block.key for block in whole]
            await store.commit(self._lease, zip(keys, digests, strict=True))
            self._committed(whole)

    def _committed(self, blocks: Seq[Block]) -> None:
        self.stats.num_blocks += len(blocks)
        self.stats.num_bytes += len(blocks) * self._spec.block_bytes
        for block in blocks:
            block.settle()
        if not any(block.reservation for block in self._pending):
            self.stats.ended_ns = time.time_ns()

    async def _abandon_rest(self, store: BlockWriter) -> None:
        """Blocks that stay are given up as well: their pages will be. A store that hangs is not
        waited for: it drops them with their lease.
        """
        await self._pool.tell_no_more()
        if self._pool.share:
            store.close_share(self._pool.share)
        shared = {*self._pool.kept, *self._pool.wanted_blocks}
        rest = [block.key for block in self._blocks if block.reservation or block in shared]
        if rest:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABANDON_WITHIN_S):
                    await store.abandon(self._lease, rest)


async def _seal(store: BlockWriter, blocks: Seq[Block], digests: list[bytes]) -> None:
    """Adds the digests of pages, if there are to be any."""
    if store.seals_pages and blocks:
        places = [(block.key, block.num_tokens, block.page) for block in blocks]
        digests += await store.seal_pages(places, staying=False)
