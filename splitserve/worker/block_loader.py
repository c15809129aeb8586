"""Brings a request's KV blocks from a store into the pages of its sequences.

1. `load` is called on the engine's thread for each choice that was given pages.
2. Choices that arrive before the first block is here form one group: each block is read once
   and inserted into the page that each of them has for it.
3. The group awaits its blocks under the request's lease. Of those that another worker computes
   in a pool that can be mapped, layers are copied as they are told of. All that are committed are
   copied into the pages together, and verified there (`KvStoreClient.take_pages`).
   What the prefill worker's receipt names is looked for there ahead of the store's word.
4. The core is told how many good blocks each choice got, counted from the first without a gap.
   What is missing or corrupt is computed on this worker instead: no page counts as filled, and none
   is read, before its block is verified.
5. When every choice of a request has been told of, blocks that were read in another worker's pool
   are let go.

Invariant: once the core was told, nothing here touches the pages again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import (
    Awaitable,
    Callable,
    Iterator,
)
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile

from splitserve.engine.sequence import PageLoad, Sequence
from splitserve.errors import BlockCorrupt, BlockNotFound, SplitserveError
from splitserve.kv.layout import Lease, ReadableBlock
from splitserve.kv.receipt import KvReceipt
from splitserve.worker.announcements import Announcements
from splitserve.worker.block_loads import Ahead, Load, LoadGroup, layers_at
from splitserve.worker.block_reader import BlockReader

LET_GO_AFTER_S = 0.005
"""So long the call waits: it would hold the interpreter while the engine's thread launches the
first step over the blocks.
"""

_log = logging.getLogger(__name__)

Loaded = Callable[[str, int], None]


@dataclass
class LoadStats:
    """What one request loaded, for its trace. Times are Unix nanoseconds, 0 for never; `busy_ns` is
    how long blocks were copied and verified.
    """

    began_ns: int = 0
    ended_ns: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    num_corrupt: int = 0
    busy_ns: int = 0
    transport: str = ""


class BlockLoader:
    """The `KvSource` of all choices of one request.

    `open_store` connects to the store that granted the lease. With `wait_for_writer` a block that
    nobody has reserved yet is waited for; without, only what is there or on its way is loaded.
    `timeout_s` bounds the wait where neither the lease nor the request ends first. `num_loads` is
    how many choices will load, after which blocks in pools are let go; 0: others read under the
    same lease, and they are held until it ends. Make it in the request's context: what it calls and
    logs belongs to the trace that is current there.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        open_store: Callable[[Lease], Awaitable[BlockReader]],
        loaded: Loaded,
        block_bytes: int,
        wait_for_writer: bool,
        timeout_s: float,
        num_loads: int = 0,
    ) -> None:
        self._lease = lease
        self._open_store = open_store
        self._loaded = loaded
        self._block_bytes = block_bytes
        self._announcements = Announcements(
            lease, block_bytes=block_bytes, wait_for_writer=wait_for_writer, timeout_s=timeout_s
        )
        self._num_loads = num_loads
        # Choices that were told, or will never ask.
        self._ended: set[str] = set()
        self._in_pools: set[bytes] = set()
        self._letting_go: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._groups: list[LoadGroup] = []
        self._cancelled: set[str] = set()
        self.stats = LoadStats()

    def load(self, sequence: Sequence, blocks: Seq[PageLoad]) -> None:
        """See `KvSource.load`. Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._begin, Load(sequence.id, list(blocks)))

    def prefill_done(self, receipt: KvReceipt | None = None) -> None:
        """The prefill has ended: what nobody has reserved by now will not come. What its receipt
        names is there.
        """
        self._announcements.prefill_done(receipt)

    def cancel(self, sequence_id: str) -> None:
        """Stop loading for one choice; the core is told as soon as its pages are untouched."""
        self._cancelled.add(sequence_id)
        for group in self._groups:
            if not group.inserting:
                self._drop_cancelled(group)
        loading = (load.sequence_id for group in self._groups for load in group.loads)
        if sequence_id not in loading:
            self._ended.add(sequence_id)
            self._let_go_if_done()

    async def ended(self) -> None:
        """Wait until nothing that has begun touches a page any more, and others' were let go."""
        tasks = [group.task for group in self._groups if group.task]
        if tasks:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)  # what ends them is called
        if self._letting_go:
            await asyncio.wait(self._letting_go)

    def _begin(self, load: Load) -> None:
        if load.sequence_id in self._cancelled:
            self._settle(load)
            self._let_go_if_done()
            return
        self.stats.began_ns = self.stats.began_ns or time.time_ns()
        for group in self._groups:
            if group.joins(load):
                group.loads.append(load)
                return
        group = LoadGroup([load])
        self._groups.append(group)
        group.task = self._loop.create_task(self._run(group), context=self._context.copy())
        # A callback, for a task that is cancelled before it began runs no `finally`.
        group.task.add_done_callback(lambda _: self._end(group))

    async def _run(self, group: LoadGroup) -> None:
        try:
            await self._fill(group)
        except SplitserveError as error:
            _log.info("KV is recomputed: %s", error.message)
        except Exception:
            _log.exception("KV is recomputed: loading it failed")

    def _let_go_if_done(self) -> None:
        """Others' pages are not needed any more once every choice has its own."""
        if 0 < self._num_loads <= len(self._ended) and self._in_pools:
            keys, self._in_pools = self._in_pools, set()
            # Not a part of any load: that of a request that ends at once is cancelled.
            task = self._loop.create_task(self._let_go(keys), context=self._context.copy())
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    async def _let_go(self, keys: set[bytes]) -> None:
        await asyncio.sleep(LET_GO_AFTER_S)
        try:
            store = await self._open_store(self._lease)
            await store.let_go(self._lease, keys)
        except SplitserveError as error:
            _log.info("blocks are held until the lease ends: %s", error.message)

    def _end(self, group: LoadGroup) -> None:
        self._groups.remove(group)
        for load in group.loads:
            self._settle(load)
        self._let_go_if_done()

    def _drop_cancelled(self, group: LoadGroup) -> None:
        for load in group.loads:
            if load.sequence_id in self._cancelled:
                self._settle(load)
        if group.idle and group.task:
            group.task.cancel()

    async def _fill(self, group: LoadGroup) -> None:
        """Insert the group's blocks in order until all are there or one is missing."""
        store = await self._open_store(self._lease)
        self.stats.transport = store.transport_name
        lacking = list(group.loads[0].blocks)
        if not await self._fill_in_order(store, group, lacking):
            # They have moved, or gone, since the receipt was given.
            _log.info("blocks are not where the receipt says, the store is asked")
            self._announcements.forget_receipt()
            group.ahead.clear()
            await self._fill_in_order(store, group, lacking)

    async def _fill_in_order(
        self, store: BlockReader, group: LoadGroup, lacking: list[PageLoad]
    ) -> bool:
        """Takes off `lacking` what is inserted. False: a block that the receipt names is not good,
        or not there. Raises `BlockCorrupt` for one that the store named.
        """
        arrived: dict[bytes, ReadableBlock] = {}
        lost: set[bytes] = set()
        indexes = {block.key: block.index for block in lacking}
        announced = self._announcements.of(store, list(lacking), group.partial)
        async with contextlib.aclosing(announced) as announcements:
            async for ready, missing in announcements:
                group.joinable = False
                if group.partial:
                    await self._copy_ahead(store, group, indexes)
                arrived.update((block.key, block) for block in ready)
                self._in_pools.update(block.key for block in ready if block.pool_page)
                lost.update(missing)
                there = takewhile(lambda block: block.key in arrived, lacking)
                batch = [(block.index, arrived[block.key]) for block in there]
                num_good = await self._bring_good(store, group, batch)
                del lacking[:num_good]
                if num_good < len(batch):
                    return self._blame(batch[num_good][1])
                if not lacking or lacking[0].key in lost or group.idle:
                    break
        return True

    def _blame(self, block: ReadableBlock) -> bool:
        """False if the receipt is to blame. Raises `BlockCorrupt` otherwise."""
        if block.key in self._announcements.hinted:
            return False
        self.stats.num_corrupt += 1
        raise BlockCorrupt(
            f"block {block.key.hex()[:16]} of {block.size_bytes} bytes is not what it should be"
        )

    async def _copy_ahead(
        self, store: BlockReader, group: LoadGroup, indexes: dict[bytes, int]
    ) -> None:
        """Copy what is computed of blocks that are not whole. What fails is copied later."""
        news = {block.key: block for block in group.partial if block.key in indexes}
        group.partial.clear()
        targets = [group.targets(indexes[key]) for key in news]
        firsts = [
            layers_at(group.ahead.get(key), block.pool_page, pages)
            for (key, block), pages in zip(news.items(), targets, strict=True)
        ]
        group.inserting = True
        try:
            with self._busy():
                copied = await store.copy_ahead(list(news.values()), targets, firsts)
            for (key, block), pages, is_there in zip(news.items(), targets, copied, strict=True):
                if is_there:
                    group.ahead[key] = Ahead(block.pool_page, block.num_layers, pages)
        except SplitserveError as error:
            _log.info("layers are not copied ahead: %s", error.message)
        finally:
            group.inserting = False
        self._drop_cancelled(group)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        began = time.monotonic_ns()
        try:
            yield
        finally:
            self.stats.busy_ns += time.monotonic_ns() - began

    async def _bring_good(
        self, store: BlockReader, group: LoadGroup, batch: Seq[tuple[int, ReadableBlock]]
    ) -> int:
        """`_bring`; a pool that is gone is no fault where only the receipt named it."""
        try:
            return await self._bring(store, group, batch) if batch else 0
        except BlockNotFound:
            if any(block.key in self._announcements.hinted for _, block in batch):
                return 0
            raise

    async def _bring(
        self, store: BlockReader, group: LoadGroup, batch: Seq[tuple[int, ReadableBlock]]
    ) -> int:
        """Fill the pages that want these blocks, up to the first that is not good. How many are."""
        fitting = list(takewhile(lambda one: one[1].size_bytes == self._block_bytes, batch))
        blocks = [block for _, block in fitting]
        wanting = [
            [(load, page.page) for load in group.loads if (page := load.wants(index)) is not None]
            for index, _ in fitting
        ]
        if any(block.pool_page for block in blocks):
            self.stats.transport = "device"
        targets = [[page for _, page in pages] for pages in wanting]
        firsts = [
            layers_at(group.ahead.get(block.key), block.pool_page, pages)
            for block, pages in zip(blocks, targets, strict=True)
        ]
        group.inserting = True
        try:
            with self._busy():
                hinted = self._announcements.hinted
                good = await store.take_pages(self._lease, blocks, targets, firsts, hinted=hinted)
        finally:
            group.inserting = False
        num_good = sum(1 for _ in takewhile(bool, good))
        self.stats.num_blocks += num_good
        self.stats.num_bytes += num_good * self._block_bytes
        for pages in wanting[:num_good]:
            for load, _ in pages:
                load.filled += 1
        self._drop_cancelled(group)
        for load in group.loads:
            if load.filled == len(load.blocks):
                self._settle(load)  # now: to end the wait for the store takes longer
        return num_good

    def _settle(self, load: Load) -> None:
        if not load.settled:
            load.settled = True
            self._ended.add(load.sequence_id)
            self.stats.ended_ns = time.time_ns()
            self._loaded(load.sequence_id, load.filled)
