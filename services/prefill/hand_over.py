"""Hands a prompt's blocks to the store while later layers are still being computed.

1. The core reports that pages are set aside; the blocks are reserved under the lease. A block that
   is there already, or that another is writing, is left to them.
2. Each group of layers that is complete is copied out of the pages into the store.
3. A block whose layers are all written is committed with the digest of what was copied.
4. Whatever was not committed in the end is abandoned, so that who awaits it is told.

A block that may stay in the pool is committed where it is once it is whole; before that the store
is told how far it is, for readers that copy ahead. Its page is kept until
the store says that the block is gone: it was read, or its leases have ended. While nothing else is
left to do the store is asked for the lease as well, so that no page is kept for one that has ended,
or for a store that does not answer. If someone who cannot map the pool waits for a block, it goes
the way of the others after all; so do blocks that are not whole yet when the pool's registration is
lost. Those that were whole are lost with it.

The decode worker is told of blocks that stay twice: by the store, and sooner by a receipt that goes
with the first tokens. It is given once all of them are digested, before they are committed.

The engine's thread only posts what is ready. Copies and digests run in the copier's threads, one
round of them at a time: what becomes ready meanwhile is the next round. The compute waits for
none of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from services.prefill.block_writer import BlockWriter, OpenStore
from services.prefill.pending_receipt import PendingReceipt
from splitserve.engine.protocol import EngineSpec
from splitserve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
    SplitserveError,
    Unavailable,
)
from splitserve.kv.codec import BlockHasher
from splitserve.kv.layout import BlockSpec, Lease, Reservation
from splitserve.kv.page_mover import PagePart
from splitserve.kv.pool_sharing import PoolShare
from splitserve.kv.receipt import KvReceipt

BLOCKS_PER_ROUND = 64
"""Bounds the memory of one round of copies that go through buffers."""

ASK_EVERY_S = 0.5
"""How often the lease is asked for while pages are kept for readers only, and how long the answer
may take: together no page outlives its lease by more than a second.
"""

ANSWER_WITHIN_S = 0.005
"""So long the last commit lets the first tokens go ahead: its message takes the loop longer to make
than the answer does, and the decode worker waits for the answer alone.
"""

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


@dataclass(eq=False)
class _Block:
    """0 <= written <= ready <= layers of the block. `reservation` is set until it is committed."""

    key: bytes
    index: int
    page: int
    num_tokens: int
    ready: int = 0
    written: int = 0
    reservation: Reservation | None = None
    hasher: BlockHasher | None = None


class HandOver:
    """The `KvSink` of one prompt, and the `ShareListener` of its blocks that stay in the pool."""

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
        self._ask_every_s = ask_every_s
        self._prompt_tokens = prompt_tokens
        self._spec = spec
        self._open_store = open_store
        self._loop = asyncio.get_running_loop()
        # Of the request: what is called and logged here belongs to its trace.
        self._context = contextvars.copy_context()
        self._blocks: list[_Block] = []
        self._pending: list[_Block] = []
        self._share: PoolShare | None = None
        self._shared: dict[bytes, _Block] = {}
        self._wanted: list[_Block] = []
        self._news = asyncio.Event()
        self._receipt = PendingReceipt()
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

    def answered(self) -> None:
        """The first tokens were sent: what waited for that goes on."""
        self._receipt.answered()

    async def receipt(self, within_s: float) -> KvReceipt | None:
        """What stays in the pool, once that is whole and digested. None: nothing does, or it is
        not within the time; the store will tell.
        """
        return await self._receipt.given(within_s) if self._task else None

    async def ended(self) -> None:
        """Wait until nothing here touches a page any more, and nobody else reads one."""
        if self._task:
            await asyncio.wait([self._task])

    def gone(self, keys: Iterable[bytes]) -> None:
        """See `ShareListener.gone`."""
        for key in keys:
            self._shared.pop(key, None)
        self._news.set()

    def wanted(self, keys: Iterable[bytes]) -> None:
        """See `ShareListener.wanted`."""
        self._wanted += [self._shared.pop(key) for key in keys if key in self._shared]
        self._news.set()

    def lost(self) -> None:
        """See `ShareListener.lost`. Nothing is shared from here on."""
        self._share = None
        self._receipt.finish(None)
        self.gone(list(self._shared))

    def _begin(self, keys: Seq[bytes], pages: Seq[int], num_cached_blocks: int) -> None:
        if self._cancelled:
            return
        block, layers = self._spec.block_tokens, self._spec.num_layers
        self._blocks = [
            _Block(
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
            self._share = store.open_share(self)
            try:
                await self._reserve(store, self._blocks, self._share)
                if not any(map(_stays, self._pending)):
                    self._receipt.finish(None)
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
            self._receipt.finish(None)
            self.stats.ended_ns = self.stats.ended_ns or time.time_ns()

    async def _reserve(
        self, store: BlockWriter, blocks: list[_Block], share: PoolShare | None
    ) -> None:
        size, fingerprint = self._spec.block_bytes, store.layout.fingerprint
        specs = [BlockSpec(block.key, size, block.num_tokens) for block in blocks]
        reservations = await store.reserve(self._lease, specs, share)
        for block, reservation in zip(blocks, reservations, strict=True):
            if reservation.must_write:
                block.reservation, block.written = reservation, 0
                block.hasher = BlockHasher(block.key, block.num_tokens, fingerprint, size)
                self._pending.append(block)
            else:
                block.reservation = block.hasher = None
                self.stats.num_present += 1
        in_pool = any(r.must_write and r.in_pool for r in reservations)
        self.stats.transport = "device" if in_pool else store.transport_name

    async def _hand_over_all(self, store: BlockWriter) -> None:
        """Until all blocks are committed and nobody reads a page of ours any more."""
        while self._pending or self._shared or self._wanted:
            self._news.clear()
            await self._bring_to_arena(store)
            due = [block for block in self._pending if block.written < block.ready]
            if batch := due[:BLOCKS_PER_ROUND]:
                self.stats.first_ns = self.stats.first_ns or time.time_ns()
                began = time.monotonic_ns()
                await self._write_round(store, batch)
                self.stats.busy_ns += time.monotonic_ns() - began
                self._pending = [block for block in self._pending if block.reservation]
            elif self._pending:
                await self._news.wait()
            elif self._shared:
                await self._keep_pages(store)

    async def _bring_to_arena(self, store: BlockWriter) -> None:
        """Reserve anew, with space, what may not stay in the pool. What finds none is given up."""
        wanted = list(self._wanted)
        astray = [] if self._share else [block for block in self._pending if _stays(block)]
        if not (blocks := list(dict.fromkeys([*wanted, *astray]))):
            return
        self._pending = [block for block in self._pending if block not in blocks]
        try:
            await self._reserve(store, blocks, None)
        except Overloaded as error:
            self.stats.error = error
            _log.info("%d blocks find no room in the store: %s", len(blocks), error.message)
            await store.abandon(self._lease, [block.key for block in blocks])
            for block in blocks:
                block.reservation = block.hasher = None
        del self._wanted[: len(wanted)]

    async def _keep_pages(self, store: BlockWriter) -> None:
        """Wait for news of shared blocks, but not past the end of their lease or of the store."""
        try:
            async with asyncio.timeout(self._ask_every_s):
                await self._news.wait()
            return
        except TimeoutError:
            pass
        try:
            async with asyncio.timeout(self._ask_every_s):
                await store.check_lease(self._lease)
            return
        except LeaseEnded:
            _log.info("the lease has ended, its pages are kept no longer")
        except (Unavailable, DeadlineExceeded, TimeoutError):
            self.stats.error = Unavailable("the store does not answer")
            _log.info("the store does not answer, pages are kept for it no longer")
        # Not abandoned: that is a wait for the store as well. Who still reads them finds out.
        self._shared.clear()
        self._wanted.clear()

    async def _write_round(self, store: BlockWriter, batch: list[_Block]) -> None:
        """Copy what is ready of each block, or leave it where it is, and commit what is whole."""
        staying = [block for block in batch if _stays(block)]
        if staying and self._share:
            await self._leave_in_pool(store, self._share, staying)
        going = [block for block in batch if not _stays(block) and block.reservation]
        if going:
            await self._write_to_arena(store, going)

    async def _write_to_arena(self, store: BlockWriter, blocks: list[_Block]) -> None:
        parts = [_part(block, block.ready) for block in blocks]
        await store.put_pages(self._lease, parts)
        for block, part in zip(blocks, parts, strict=True):
            block.written = part.end_layer
        whole = [block for block in blocks if block.written == self._spec.num_layers]
        digests = [(block.key, block.hasher.digest()) for block in whole if block.hasher]
        if digests:
            await store.commit(self._lease, digests)
            self._committed(whole)

    async def _leave_in_pool(
        self, store: BlockWriter, share: PoolShare, blocks: list[_Block]
    ) -> None:
        """What is not done because the share was lost meanwhile is left to `_bring_to_arena`."""
        try:
            await self._share_blocks(store, share, blocks)
        except InvalidRequest:
            if self._share is share:
                raise

    async def _share_blocks(
        self, store: BlockWriter, share: PoolShare, blocks: list[_Block]
    ) -> None:
        ends = [block.ready for block in blocks]
        whole = [block for block in blocks if block.ready == self._spec.num_layers]
        partial = [(b.key, b.page, b.ready) for b in blocks if b.ready < self._spec.num_layers]
        if partial:
            await store.report_layers(self._lease, share, partial)
        if self._share is not share:
            return
        if whole:
            places = [(block.key, block.num_tokens, block.page) for block in whole]
            digests = await store.seal_pages(places)
            if self._share is not share:
                return
            await self._give_receipt(share, whole, digests)
            # News of them may come before the answer, that all are lost as well.
            self._shared.update((block.key, block) for block in whole)
            sealed = [(b.key, b.page, d) for b, d in zip(whole, digests, strict=True)]
            try:
                await store.share_pages(self._lease, share, sealed)
            except LeaseEnded:
                if not self._receipt.is_given:
                    raise
                # Who had the receipt has read the pages, and the lease was released for it.
                self._shared.clear()
            self._committed(whole)
        for block, end in zip(blocks, ends, strict=True):
            block.written = end

    async def _give_receipt(
        self, share: PoolShare, whole: list[_Block], digests: list[bytes]
    ) -> None:
        """Note what was sealed; if it is the last, have the answer go out ahead of the commit."""
        self._receipt.add((b.index, b.page, d) for b, d in zip(whole, digests, strict=True))
        if not any(_stays(block) for block in self._pending if block not in whole):
            self._receipt.finish(share)
            await self._receipt.out(ANSWER_WITHIN_S)

    def _committed(self, blocks: list[_Block]) -> None:
        self.stats.num_blocks += len(blocks)
        self.stats.num_bytes += len(blocks) * self._spec.block_bytes
        for block in blocks:
            block.reservation = block.hasher = None
        if not any(block.reservation for block in self._pending):
            self.stats.ended_ns = time.time_ns()

    async def _abandon_rest(self, store: BlockWriter) -> None:
        """Blocks that stay are given up as well: their pages will be."""
        if self._share:
            store.close_share(self._share)
        rest = [
            block.key
            for block in self._blocks
            if block.reservation or block.key in self._shared or block in self._wanted
        ]
        if rest:
            await store.abandon(self._lease, rest)


def _stays(block: _Block) -> bool:
    return block.reservation is not None and block.reservation.in_pool


def _part(block: _Block, end_layer: int) -> PagePart:
    if block.reservation is None or block.hasher is None:
        raise RuntimeError("a block is written that was not reserved")
    return PagePart(
        block.key, block.reservation, block.page, block.written, end_layer, block.hasher
    )
