"""Which of a request's blocks are there: what the store says of them, or the prefill's receipt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection
from collections.abc import Sequence as Seq
from typing import Any

from splitserve.engine.sequence import PageLoad
from splitserve.kv.layout import Lease, PartialBlock, ReadableBlock
from splitserve.kv.receipt import KvReceipt
from splitserve.worker.block_reader import BlockReader, Decided

STRAGGLER_S = 0.25
"""How long after the prefill's end an awaited block may take to be announced by the store."""


class Announcements:
    """Of the blocks of one request, to as many as ask. The arguments are `BlockLoader`'s."""

    def __init__(
        self, lease: Lease, *, block_bytes: int, wait_for_writer: bool, timeout_s: float
    ) -> None:
        self._lease = lease
        self._block_bytes = block_bytes
        self._wait_for_writer = wait_for_writer
        self._timeout_s = timeout_s
        self._receipt: KvReceipt | None = None
        self._hinted: set[bytes] = set()
        self._prefill_done = asyncio.Event()

    def prefill_done(self, receipt: KvReceipt | None) -> None:
        """See `BlockLoader.prefill_done`."""
        self._receipt = receipt
        self._prefill_done.set()

    def forget_receipt(self) -> None:
        """It is out of date: only the store is asked from here on."""
        self._receipt = None

    @property
    def hinted(self) -> Collection[bytes]:
        """Keys of the blocks that were announced on the receipt's word alone."""
        return frozenset(self._hinted)

    async def of(
        self, store: BlockReader, wanted: Seq[PageLoad], partial: list[PartialBlock]
    ) -> AsyncGenerator[Decided, None]:
        """`await_blocks`, asked again as the prefill goes on, and cut short by its receipt.

        As long as it may, a block that a writer gave up may still come from another worker. Once
        it has ended, what nobody has reserved will not come.
        """
        undecided = {block.key: block for block in wanted}
        wait = self._wait_for_writer
        while undecided:
            if named := self._take_named(store, undecided):
                yield named, []
                continue
            stream = store.await_blocks(
                self._lease, list(undecided), wait, timeout_s=self._timeout_s, partial=partial
            )
            async with contextlib.aclosing(self._of_stream(stream, store, undecided, wait)) as news:
                async for decided in news:
                    yield decided
            if not wait:
                return
            wait = not self._prefill_done.is_set()

    async def _of_stream(
        self,
        stream: AsyncGenerator[Decided, None],
        store: BlockReader,
        undecided: dict[bytes, PageLoad],
        wait: bool,
    ) -> AsyncGenerator[Decided, None]:
        """What one call to the store says, until all is decided, it ends, or a straggler should be
        asked for again.
        """
        upcoming: asyncio.Future[Decided | None] | None = None
        try:
            while undecided:
                upcoming = upcoming or asyncio.ensure_future(anext(stream, None))
                if wait:
                    await self._prefill_done_or(upcoming)
                    if named := self._take_named(store, undecided):
                        if not undecided:
                            upcoming.cancel()  # to read it now would hold up the copies
                        yield named, []
                        continue
                    await asyncio.wait({upcoming}, timeout=STRAGGLER_S)
                    if not upcoming.done():
                        return
                batch, upcoming = await upcoming, None
                if batch is None:
                    return
                ready, missing = batch
                if wait and not self._prefill_done.is_set():
                    missing = []
                for key in (*(block.key for block in ready), *missing):
                    undecided.pop(key, None)
                    self._hinted.discard(key)
                yield ready, missing
        finally:
            if upcoming is not None:
                await _drop(upcoming)
            await stream.aclose()

    async def _prefill_done_or(self, upcoming: asyncio.Future[Decided | None]) -> None:
        done = asyncio.ensure_future(self._prefill_done.wait())
        either: set[asyncio.Future[Any]] = {upcoming, done}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            done.cancel()

    def _take_named(
        self, store: BlockReader, undecided: dict[bytes, PageLoad]
    ) -> list[ReadableBlock]:
        """Those that the receipt names, if there is one and its pool can be read."""
        receipt = self._receipt
        if receipt is None or not store.can_map(receipt.pool_id):
            return []
        named = []
        for block in list(undecided.values()):
            if block.index in receipt.blocks:
                page, digest = receipt.blocks[block.index]
                place, size = receipt.place_of(page), self._block_bytes
                named.append(ReadableBlock(block.key, 0, size, digest, block.num_tokens, place))
                del undecided[block.key]
        self._hinted.update(block.key for block in named)
        return named


async def _drop(upcoming: asyncio.Future[Decided | None]) -> None:
    """Whatever it would have brought is not needed any more."""
    upcoming.add_done_callback(_look_at)
    upcoming.cancel()
    await asyncio.wait({upcoming})


def _look_at(upcoming: asyncio.Future[Decided | None]) -> None:
    """What it raised is not reported as unseen."""
    if not upcoming.cancelled():
        upcoming.exception()
