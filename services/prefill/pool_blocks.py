"""The blocks of one prompt that stay in the worker's pool until they were read.

Each is told of when its last group of layers is all that is missing, for readers that copy ahead,
which nothing here waits for; digested once it is whole; named on the receipt; and committed where
it is. From then on its page is kept until the store says that the block is gone: it was read, or
its leases have ended. While nothing else is left to do the store is asked for the lease as well, so
that no page is kept for one that has ended, or for a store that does not answer.

If someone who cannot map the pool waits for a block, it is `wanted` in the arena after all. When
the pool's registration is lost, so are the blocks that were committed; nothing stays from there on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from services.prefill.block import Block
from services.prefill.block_writer import BlockWriter
from services.prefill.pending_receipt import PendingReceipt
from splitserve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LeaseEnded,
    SplitserveError,
    Unavailable,
)
from splitserve.kv.layout import Lease
from splitserve.kv.pool_sharing import PoolShare

ASK_EVERY_S = 0.5
"""How often the lease is asked for while pages are kept for readers only, and how long the answer
may take: together no page outlives its lease by more than a second.
"""

_log = logging.getLogger(__name__)


class PoolBlocks:
    """Implements `ShareListener`. `news` is set whenever there is something to do."""

    def __init__(
        self,
        lease: Lease,
        *,
        num_layers: int,
        layer_group: int,
        news: asyncio.Event,
        ask_every_s: float,
    ) -> None:
        self._lease = lease
        self._num_layers = num_layers
        # Each report costs the store and the reader more time than the copy of a group does.
        self._told_from = max(1, num_layers - layer_group)
        self._news = news
        self._ask_every_s = ask_every_s
        self._kept: dict[bytes, Block] = {}
        self._untold: dict[bytes, tuple[bytes, int, int]] = {}
        self._telling: asyncio.Task[None] | None = None
        self.wanted_blocks: list[Block] = []
        self.share: PoolShare | None = None
        self.receipt = PendingReceipt()

    @property
    def kept(self) -> list[Block]:
        """Committed blocks whose pages someone may still read."""
        return list(self._kept.values())

    # -- what the store says -------------------------------------------------------------------

    def gone(self, keys: Iterable[bytes]) -> None:
        """See `ShareListener.gone`."""
        for key in keys:
            self._kept.pop(key, None)
        self._news.set()

    def wanted(self, keys: Iterable[bytes]) -> None:
        """See `ShareListener.wanted`."""
        self.wanted_blocks += [self._kept.pop(key) for key in keys if key in self._kept]
        self._news.set()

    def lost(self) -> None:
        """See `ShareListener.lost`. Nothing is shared from here on."""
        self.share = None
        self.receipt.finish(None)
        self.gone(list(self._kept))

    # -- what the hand-over does ---------------------------------------------------------------

    async def leave(
        self, store: BlockWriter, blocks: Seq[Block], pending: Seq[Block]
    ) -> Seq[Block]:
        """Tell of what is ready of `blocks`, and commit what is whole. Which were committed: none,
        if the share was lost meanwhile. `pending` are all that are not committed yet.
        """
        share = self.share
        if share is None:
            return []
        try:
            return await self._leave(store, share, blocks, pending)
        except InvalidRequest:
            if self.share is share:
                raise
            return []

    async def tell_no_more(self) -> None:
        """Until nobody tells the store of layers."""
        self._untold.clear()
        if self._telling:
            self._telling.cancel()
            await asyncio.wait({self._telling})

    async def outlast(self, store: BlockWriter) -> SplitserveError | None:
        """Wait for news of the pages that are kept, but not past the end of their lease, or of the
        store, which is returned as an error.
        """
        try:
            async with asyncio.timeout(self._ask_every_s):
                await self._news.wait()
            return None
        except TimeoutError:
            pass
        error = None
        try:
            async with asyncio.timeout(self._ask_every_s):
                await store.check_lease(self._lease)
            return None
        except LeaseEnded:
            _log.info("the lease has ended, its pages are kept no longer")
        except (Unavailable, DeadlineExceeded, TimeoutError):
            error = Unavailable("the store does not answer")
            _log.info("the store does not answer, pages are kept for it no longer")
        # Not abandoned: that is a wait for the store as well. Who still reads them finds out.
        self._kept.clear()
        self.wanted_blocks.clear()
        return error

    async def _leave(
        self, store: BlockWriter, share: PoolShare, blocks: Seq[Block], pending: Seq[Block]
    ) -> Seq[Block]:
        ends = [block.ready for block in blocks]
        whole = [block for block in blocks if block.ready == self._num_layers]
        for block in whole:
            self._untold.pop(block.key, None)
        worth_telling = range(self._told_from, self._num_layers)
        self._tell(store, share, [block for block in blocks if block.ready in worth_telling])
        if whole:
            places = [(block.key, block.num_tokens, block.page) for block in whole]
            digests = await store.seal_pages(places, staying=True)
            self.receipt.add((b.index, b.page, d) for b, d in zip(whole, digests, strict=True))
            if set(whole).issuperset(block for block in pending if block.stays):
                self.receipt.finish(share)
            if self._telling:
                await asyncio.wait({self._telling})  # no report comes after the commit
            if self.share is not share:
                return []
            await self._commit(store, share, whole, digests)
        for block, end in zip(blocks, ends, strict=True):
            block.written = end
        return whole

    def _tell(self, store: BlockWriter, share: PoolShare, blocks: Seq[Block]) -> None:
        """Have the store told of what is ready of blocks that are not whole."""
        self._untold.update((block.key, (block.key, block.page, block.ready)) for block in blocks)
        if self._untold and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._tell_all(store, share))

    async def _tell_all(self, store: BlockWriter, share: PoolShare) -> None:
        """One report at a time: what becomes ready meanwhile is in the next."""
        try:
            while self._untold and self.share is share:
                blocks = list(self._untold.values())
                self._untold.clear()
                await store.report_layers(self._lease, share, blocks)
        except SplitserveError as error:
            # If it matters the commit fails, too.
            _log.info("readers are not told of layers: %s", error.message)
        except Exception:
            _log.exception("readers are not told of layers")

    async def _commit(
        self, store: BlockWriter, share: PoolShare, whole: Seq[Block], digests: Seq[bytes]
    ) -> None:
        # News of them may come before the answer, that all are lost as well.
        self._kept.update((block.key, block) for block in whole)
        sealed = [(b.key, b.page, d) for b, d in zip(whole, digests, strict=True)]
        try:
            await store.share_pages(self._lease, share, sealed)
        except LeaseEnded:
            if not self.receipt.is_complete:
                raise
            # Who has the receipt may have read the pages, and the lease been released for it, ahead
            # of this. Nobody else can read them now.
            self._kept.clear()
