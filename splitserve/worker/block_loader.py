"""Brings a request's KV blocks from a store into the pages of its sequences.

1. `load` is called on the engine's thread for each choice that was given pages.
2. Choices that arrive before the first block is here form one group: each block is read once
   and inserted into the page that each of them has for it.
3. The group awaits its blocks under the request's lease. Each is copied out of the store, its
   digest is verified on the copy, and only then is it inserted (`KvStoreClient.read`).
4. The core is told how many blocks each choice got, counted from the first without a gap. What
   is missing or corrupt is computed on this worker instead.

Invariant: once the core was told, nothing here touches the pages again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from splitserve.engine.sequence import PageLoad, Sequence
from splitserve.errors import BlockCorrupt, SplitserveError
from splitserve.kv.copier import Copier
from splitserve.kv.layout import Lease, ReadableBlock

STRAGGLER_S = 0.25
"""How long after the prefill's end an awaited block may take to be announced by the store."""

_log = logging.getLogger(__name__)


InsertPage = Callable[[int, memoryview], None]
Loaded = Callable[[str, int], None]
Decided = tuple[list[ReadableBlock], list[bytes]]


class BlockReader(Protocol):
    """The part of `KvStoreClient` that a loader needs."""

    @property
    def transport_name(self) -> str:
        """How bytes travel."""
        ...

    def await_blocks(
        self, lease: Lease, keys: Seq[bytes], wait_for_writer: bool, *, timeout_s: float
    ) -> AsyncIterator[Decided]:
        """Name each block once it is decided: readable ones, missing ones."""
        ...

    async def read(self, lease: Lease, block: ReadableBlock, out: memoryview) -> None:
        """Copy a block out and verify the copy."""
        ...


@dataclass
class LoadStats:
    """What one request loaded, for its trace. Times are Unix nanoseconds, 0 for never."""

    began_ns: int = 0
    ended_ns: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    num_corrupt: int = 0
    transport: str = ""


@dataclass(eq=False)
class _Load:
    """One choice's pages: `filled` of `blocks` from the first are filled."""

    sequence_id: str
    blocks: list[PageLoad]
    filled: int = 0
    settled: bool = False

    def wants(self, block_index: int) -> PageLoad | None:
        """The page that the block goes to, if it is the next one this load lacks."""
        if self.settled or self.filled == len(self.blocks):
            return None
        wanted = self.blocks[self.filled]
        return wanted if wanted.index == block_index else None


@dataclass(eq=False)
class _Group:
    """Loads that share their reads. Open to more until its first block has come."""

    loads: list[_Load]
    content: memoryview
    task: asyncio.Task[None] | None = None
    joinable: bool = True
    inserting: bool = False

    @property
    def idle(self) -> bool:
        """Whether no load needs a block any more."""
        return all(load.settled for load in self.loads)

    def joins(self, load: _Load) -> bool:
        """Whether the group reads every block that `load` needs and has read none yet."""
        keys = {block.key for block in self.loads[0].blocks}
        return self.joinable and all(block.key in keys for block in load.blocks)


class BlockLoader:
    """The `KvSource` of all choices of one request.

    `open_store` connects to the store that granted the lease. With `wait_for_writer` a block that
    nobody has reserved yet is waited for; without, only what is there or on its way is loaded.
    `timeout_s` bounds the wait where neither the lease nor the request ends first. Make it in the
    request's context: what it calls and logs belongs to the trace that is current there.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        open_store: Callable[[Lease], Awaitable[BlockReader]],
        insert_page: InsertPage,
        loaded: Loaded,
        block_bytes: int,
        wait_for_writer: bool,
        timeout_s: float,
        copier: Copier,
    ) -> None:
        self._lease = lease
        self._open_store = open_store
        self._insert_page = insert_page
        self._loaded = loaded
        self._block_bytes = block_bytes
        self._wait_for_writer = wait_for_writer
        self._timeout_s = timeout_s
        self._copier = copier
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._groups: list[_Group] = []
        self._cancelled: set[str] = set()
        self._prefill_done = asyncio.Event()
        self.stats = LoadStats()

    def load(self, sequence: Sequence, blocks: Seq[PageLoad]) -> None:
        """See `KvSource.load`. Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._begin, _Load(sequence.id, list(blocks)))

    def prefill_done(self) -> None:
        """The prefill has ended: what nobody has reserved by now will not come."""
        self._prefill_done.set()

    def cancel(self, sequence_id: str) -> None:
        """Stop loading for one choice; the core is told as soon as its pages are untouched."""
        self._cancelled.add(sequence_id)
        for group in self._groups:
            if not group.inserting:
                self._drop_cancelled(group)

    async def ended(self) -> None:
        """Wait until nothing that has begun touches a page any more."""
        tasks = [group.task for group in self._groups if group.task]
        if tasks:
            await asyncio.wait(tasks)

    def _begin(self, load: _Load) -> None:
        if load.sequence_id in self._cancelled:
            self._settle(load)
            return
        self.stats.began_ns = self.stats.began_ns or time.time_ns()
        for group in self._groups:
            if group.joins(load):
                group.loads.append(load)
                return
        group = _Group([load], memoryview(bytearray(self._block_bytes)))
        self._groups.append(group)
        group.task = self._loop.create_task(self._run(group), context=self._context.copy())
        # A callback, for a task that is cancelled before it began runs no `finally`.
        group.task.add_done_callback(lambda _: self._end(group))

    async def _run(self, group: _Group) -> None:
        try:
            await self._fill(group)
        except SplitserveError as error:
            _log.info("KV is recomputed: %s", error.message)
        except Exception:
            _log.exception("KV is recomputed: loading it failed")

    def _end(self, group: _Group) -> None:
        self._groups.remove(group)
        self.stats.ended_ns = time.time_ns()
        for load in group.loads:
            self._settle(load)

    def _drop_cancelled(self, group: _Group) -> None:
        for load in group.loads:
            if load.sequence_id in self._cancelled:
                self._settle(load)
        if group.idle and group.task:
            group.task.cancel()

    async def _fill(self, group: _Group) -> None:
        """Insert the group's blocks in order until all are there or one is missing."""
        store = await self._open_store(self._lease)
        self.stats.transport = store.transport_name
        order = list(group.loads[0].blocks)
        arrived: dict[bytes, ReadableBlock] = {}
        lost: set[bytes] = set()
        keys = [block.key for block in order]
        async with contextlib.aclosing(self._announcements(store, keys)) as announcements:
            async for ready, missing in announcements:
                group.joinable = False
                arrived.update((block.key, block) for block in ready)
                lost.update(missing)
                while order and order[0].key in arrived:
                    wanted = order.pop(0)
                    await self._bring(store, group, wanted.index, arrived.pop(wanted.key))
                if not order or order[0].key in lost or group.idle:
                    return

    async def _announcements(
        self, store: BlockReader, keys: list[bytes]
    ) -> AsyncGenerator[Decided, None]:
        """`await_blocks`, asked again as the prefill goes on.

        As long as it may, a block that a writer gave up may still come from another worker. Once
        it has ended, what nobody has reserved will not come.
        """
        undecided = dict.fromkeys(keys)
        wait = self._wait_for_writer
        while undecided:
            stream = store.await_blocks(
                self._lease, list(undecided), wait, timeout_s=self._timeout_s
            )
            try:
                while (batch := await self._next(stream, wait)) is not None:
                    ready, missing = batch
                    if wait and not self._prefill_done.is_set():
                        missing = []
                    for key in (*(block.key for block in ready), *missing):
                        undecided.pop(key, None)
                    yield ready, missing
            finally:
                await stream.aclose()  # type: ignore[attr-defined]
            if not wait:
                return
            wait = not self._prefill_done.is_set()

    async def _next(self, stream: AsyncIterator[Decided], wait: bool) -> Decided | None:
        """The next batch; None at the end, or if a straggler should be asked for again."""
        upcoming = asyncio.ensure_future(anext(stream, None))
        try:
            if wait:
                done = asyncio.ensure_future(self._prefill_done.wait())
                await asyncio.wait({upcoming, done}, return_when=asyncio.FIRST_COMPLETED)
                done.cancel()
                await asyncio.wait({upcoming}, timeout=STRAGGLER_S)
                if not upcoming.done():
                    return None
            return await upcoming
        finally:
            if not upcoming.done():
                upcoming.cancel()
                await asyncio.wait({upcoming})

    async def _bring(
        self, store: BlockReader, group: _Group, index: int, block: ReadableBlock
    ) -> None:
        """Read one block and insert it wherever it is wanted. Raises `BlockCorrupt`."""
        try:
            if block.size_bytes != self._block_bytes:
                raise BlockCorrupt(f"a block has {block.size_bytes} bytes, not {self._block_bytes}")
            await store.read(self._lease, block, group.content)
        except BlockCorrupt:
            self.stats.num_corrupt += 1
            raise
        self.stats.num_blocks += 1
        self.stats.num_bytes += block.size_bytes
        wanting = [(load, page) for load in group.loads if (page := load.wants(index)) is not None]
        group.inserting = True
        try:
            await self._copier.run(self._insert, [page.page for _, page in wanting], group.content)
        finally:
            group.inserting = False
        for load, _ in wanting:
            load.filled += 1
        self._drop_cancelled(group)

    def _insert(self, pages: list[int], content: memoryview) -> None:
        for page in pages:
            self._insert_page(page, content)

    def _settle(self, load: _Load) -> None:
        if not load.settled:
            load.settled = True
            self._loaded(load.sequence_id, load.filled)
