"""Hands a prompt's blocks to the store while later layers are still being computed.

1. The core reports that pages are set aside; space in the store is reserved under the lease.
   A block that is there already, or that another is writing, is left to them.
2. Each group of layers that is complete is copied out of the pages and written to the store.
3. A block whose layers are all written is committed with the digest of what was copied.
4. Whatever was not committed in the end is abandoned, so that who awaits it is told.

The engine's thread only posts what is ready. Copies and digests run in the copier's threads, one
round of them at a time: what becomes ready meanwhile is the next round. The compute waits for
none of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from splitserve.engine.protocol import EngineSpec
from splitserve.errors import SplitserveError
from splitserve.kv.codec import block_digest
from splitserve.kv.copier import Copier
from splitserve.kv.layout import BlockSpec, KvLayout, Lease, Reservation

BLOCKS_PER_ROUND = 32
"""Bounds the memory of one round of copies."""

ExportPage = Callable[[int, int, int, memoryview], None]

_log = logging.getLogger(__name__)


class BlockWriter(Protocol):
    """The part of `KvStoreClient` that a hand-over needs."""

    @property
    def transport_name(self) -> str:
        """How bytes travel."""
        ...

    @property
    def layout(self) -> KvLayout:
        """The layout that digests cover."""
        ...

    async def reserve(self, lease: Lease, blocks: Seq[BlockSpec]) -> list[Reservation]:
        """Set space aside, all or nothing."""
        ...

    async def write(
        self,
        lease: Lease,
        key: bytes,
        reservation: Reservation,
        offset_bytes: int,
        data: memoryview,
    ) -> None:
        """Copy a part of a block into the store."""
        ...

    async def commit(self, lease: Lease, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        """Make (key, digest) blocks visible."""
        ...

    async def abandon(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Give blocks up."""
        ...


OpenStore = Callable[[Lease], Awaitable[BlockWriter]]


@dataclass
class HandOverStats:
    """What was handed over, for the trace. Times are Unix nanoseconds, 0 for never."""

    began_ns: int = 0
    ended_ns: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    num_present: int = 0
    transport: str = ""
    lease_id: str = ""
    error: SplitserveError | None = None


@dataclass(eq=False)
class _Block:
    """0 <= written <= ready <= layers of the block."""

    key: bytes
    page: int
    num_tokens: int
    ready: int = 0
    written: int = 0
    reservation: Reservation | None = None
    content: memoryview | None = None
    digest: bytes = b""


class HandOver:
    """The `KvSink` of one prompt."""

    def __init__(
        self,
        lease: Lease,
        *,
        prompt_tokens: int,
        spec: EngineSpec,
        export_page: ExportPage,
        open_store: OpenStore,
        copier: Copier,
    ) -> None:
        self._lease = lease
        self._prompt_tokens = prompt_tokens
        self._spec = spec
        self._export_page = export_page
        self._open_store = open_store
        self._copier = copier
        self._loop = asyncio.get_running_loop()
        # Of the request: what is called and logged here belongs to its trace.
        self._context = contextvars.copy_context()
        self._blocks: list[_Block] = []
        self._news = asyncio.Event()
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

    async def ended(self) -> None:
        """Wait until nothing here touches a page any more."""
        if self._task:
            await asyncio.wait([self._task])

    def _begin(self, keys: Seq[bytes], pages: Seq[int], num_cached_blocks: int) -> None:
        if self._cancelled:
            return
        block, layers = self._spec.block_tokens, self._spec.num_layers
        self._blocks = [
            _Block(
                key=key,
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
            self.stats.transport = store.transport_name
            try:
                await self._reserve(store)
                await self._write_all(store)
            finally:
                await self._abandon_rest(store)
        except SplitserveError as error:
            self.stats.error = error
            _log.info("blocks are not handed over: %s", error.message)
        except Exception as error:
            self.stats.error = SplitserveError("the hand-over failed; the worker's log says why")
            _log.exception("the hand-over failed: %s", error)
        finally:
            self.stats.ended_ns = time.time_ns()

    async def _reserve(self, store: BlockWriter) -> None:
        size = self._spec.block_bytes
        specs = [BlockSpec(block.key, size, block.num_tokens) for block in self._blocks]
        reservations = await store.reserve(self._lease, specs)
        for block, reservation in zip(self._blocks, reservations, strict=True):
            if reservation.must_write:
                block.reservation = reservation
            else:
                self.stats.num_present += 1

    async def _write_all(self, store: BlockWriter) -> None:
        pending = [block for block in self._blocks if block.reservation]
        while pending:
            self._news.clear()
            batch = [block for block in pending if block.written < block.ready]
            if batch:
                await self._write_round(store, batch[:BLOCKS_PER_ROUND])
                pending = [block for block in pending if not block.digest]
            else:
                await self._news.wait()

    async def _write_round(self, store: BlockWriter, batch: list[_Block]) -> None:
        """Copy what is ready of each block, write it, and commit those that are whole."""
        ends = [block.ready for block in batch]
        await self._copier.run(self._export, batch, ends, store.layout.fingerprint)
        writes = [
            self._write_part(store, block, end) for block, end in zip(batch, ends, strict=True)
        ]
        # With return_exceptions, the call ends only when every write has: none touches memory
        # of ours, or space of the store's, after that.
        for fault in await asyncio.gather(*writes, return_exceptions=True):
            if fault is not None:
                raise fault
        whole = [block for block in batch if block.digest]
        if whole:
            await store.commit(self._lease, [(block.key, block.digest) for block in whole])
            self.stats.num_blocks += len(whole)
            self.stats.num_bytes += len(whole) * self._spec.block_bytes
            for block in whole:
                block.reservation = block.content = None

    def _export(self, batch: list[_Block], ends: list[int], fingerprint: bytes) -> None:
        """Copy layers out of the pages. Runs in a thread of the copier."""
        layer_bytes, layers = self._spec.layer_bytes, self._spec.num_layers
        for block, end in zip(batch, ends, strict=True):
            if block.content is None:
                block.content = memoryview(bytearray(self._spec.block_bytes))
            part = block.content[block.written * layer_bytes : end * layer_bytes]
            self._export_page(block.page, block.written, end, part)
            if end == layers:
                block.digest = block_digest(block.key, block.num_tokens, fingerprint, block.content)

    async def _write_part(self, store: BlockWriter, block: _Block, end: int) -> None:
        if block.content is None or block.reservation is None:
            raise RuntimeError("a block is written that was not reserved and copied")
        layer_bytes = self._spec.layer_bytes
        offset = block.written * layer_bytes
        part = block.content[offset : end * layer_bytes]
        await store.write(self._lease, block.key, block.reservation, offset, part)
        block.written = end

    async def _abandon_rest(self, store: BlockWriter) -> None:
        rest = [block.key for block in self._blocks if block.reservation]
        if rest:
            await store.abandon(self._lease, rest)
