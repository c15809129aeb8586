"""A worker's side of one store.

The way of a block that is handed over:

1. the router grants a lease and gives it to both workers;
2. the prefill worker reserves the block, writes it while the lease is vouched for, and commits it
   with its digest (`codec`);
3. the decode worker awaits it, copies it out, and checks the digest of its own copy before it uses
   it, so that no later change can matter;
4. the router releases the lease.

A worker whose pool others can map commits the block where it is (`share_pages`) instead of writing
it, and keeps the page until the store says that it is gone; step 3 then copies from page to page.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager

from splitserve.errors import BlockNotFound
from splitserve.kv.block_client import BlockClient
from splitserve.kv.control import RPC_TIMEOUT_S, StoreControl, typed_errors
from splitserve.kv.copier import Copier
from splitserve.kv.device_mover import DeviceMover
from splitserve.kv.layout import KvLayout, Lease, PartialBlock, PoolPage, ReadableBlock
from splitserve.kv.page_mover import PageMover, all_ended
from splitserve.kv.page_part import PagePart
from splitserve.kv.pages import PageAccess, PeerPool, SharesPages
from splitserve.kv.peer_pools import PeerPools
from splitserve.kv.pool_sharing import PoolShare, PoolSharing, ShareListener
from splitserve.kv.runs import StoreRun, StoreRuns, TransportChoice
from splitserve.obs.metrics import Metrics
from splitserve.rpc.tls import TlsConfig
from splitserve.v1 import kvstore_pb2

_log = logging.getLogger(__name__)


class KvStoreClient(BlockClient):
    """A `BlockClient` that also moves blocks between a store and the pages of a worker's pool.

    Make it with `connect`, inside a running event loop, and `close` it.
    """

    _mover: PageMover | None = None
    _sharing: PoolSharing | None = None

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        worker_id: str,
        layout: KvLayout,
        tls: TlsConfig | None = None,
        transport: TransportChoice = "auto",
        rpc_timeout_s: float = RPC_TIMEOUT_S,
        metrics: Metrics | None = None,
        pages: PageAccess | None = None,
        keeps_blocks: bool = False,
    ) -> KvStoreClient:
        """Introduces the worker to the store at `address`, host:port.

        `worker_id` is unique to one run of the worker's process. `auto` takes shared memory if the
        store's handle socket can be reached from here, that is on the same node, else gRPC; and if
        `pages` can be shared, blocks stay in pools where their readers can map these.
        `pages` is the worker's pool, for `put_pages` and `take_pages`; with `keeps_blocks` its own
        blocks may stay there. Raises InvalidRequest if blocks of `layout` do not fit the store.
        Transfers are counted in `metrics`.
        """
        control, copier = StoreControl(address, tls=tls, rpc_timeout_s=rpc_timeout_s), Copier()
        runs = StoreRuns(
            control,
            copier,
            worker_id=worker_id,
            layout=layout,
            choice=transport,
            rpc_timeout_s=rpc_timeout_s,
        )
        client = cls(
            control,
            copier,
            runs,
            worker_id=worker_id,
            layout=layout,
            rpc_timeout_s=rpc_timeout_s,
            metrics=metrics,
        )
        try:
            await runs.connect()
            if pages is not None:
                client._mover = PageMover(pages, copier, layout)
                client._mover.prepare(runs.present.transport)
                if pages.shared is not None and transport in ("auto", "device"):
                    await client._use_pools(pages.shared, worker_id, keeps_blocks)
        except BaseException:
            await client.close()
            raise
        client._publisher.start()
        return client

    async def close(self) -> None:
        """Ends publishing, closes the channel and gives up the arena and others' pools."""
        await self._publisher.close()
        if self._sharing is not None:
            await self._sharing.close()
        if self._peers is not None:
            await self._peers.close()
        await self._control.close()
        await self._runs.close()
        await asyncio.to_thread(self._end_copies)

    def _end_copies(self) -> None:
        self._copier.close()
        if self._mover is not None:
            self._mover.close()

    async def put_pages(self, lease: Lease, parts: Sequence[PagePart]) -> None:
        """Copies layers of pages to blocks that were reserved as WRITE, and digests them.

        The pages must stay as they are until the call ends. A cancelled call ends once it no longer
        reads them.
        """
        mover = self._pages_mover
        run = await self._runs.of(lease)
        slices = mover.parts_to_put(run.transport, parts)
        await all_ended(self._put_slice(run, mover, lease, some) for some in slices)

    async def _put_slice(
        self, run: StoreRun, mover: PageMover, lease: Lease, parts: Sequence[PagePart]
    ) -> None:
        with self._measured(run.transport.name, "write", sum(map(mover.size_of, parts))):
            while parts:
                # What came too late is tried again, once the store has vouched for the lease anew.
                begin_by_s = await self._vouched_until(run, lease)
                parts = parts[await mover.put(run.transport, lease, parts, begin_by_s) :]

    @property
    def seals_pages(self) -> bool:
        """Whether this worker's blocks have digests of pages, which `seal_pages` takes."""
        return self._pages_mover.device is not None

    def open_share(self, listener: ShareListener) -> PoolShare | None:
        """A share for blocks that stay in this worker's pool, to be closed with `close_share`. None
        if nobody can map the pool, or the store does not know it now.
        """
        return self._sharing.open(listener) if self._sharing is not None else None

    def close_share(self, share: PoolShare) -> None:
        """The listener is told nothing more."""
        if self._sharing is not None:
            self._sharing.close_share(share)

    async def seal_pages(
        self, blocks: Sequence[tuple[bytes, int, int]], *, staying: bool
    ) -> list[bytes]:
        """The digests of whole (key, num_tokens, page) blocks. From here on the pages of those
        `staying` in the pool must be as they are until the listener is told that the blocks are
        gone, or they are given up; this is all of their transfer that is this side's.
        """
        if not staying:
            return await self._device.seal(blocks)
        with self._measured("device", "write", len(blocks) * self.layout.block_bytes):
            return await self._device.seal(blocks)

    async def share_pages(
        self, lease: Lease, share: PoolShare, blocks: Sequence[tuple[bytes, int, bytes]]
    ) -> None:
        """Commits sealed (key, page, digest) blocks, one at least, where they are."""
        await self._runs.of(lease)
        keys, pages, digests = zip(*blocks, strict=True)
        request = kvstore_pb2.CommitBlocksRequest(
            lease=lease.to_proto(),
            in_pool=kvstore_pb2.PoolCommit(
                pool_id=share.pool_id,
                share_id=share.share_id,
                keys=b"".join(keys),
                pages=pages,
                digests=b"".join(digests),
            ),
        )
        with typed_errors():
            await self._control.stub.CommitBlocks(request, timeout=self._timeout_s)

    async def report_layers(
        self, lease: Lease, share: PoolShare, blocks: Sequence[tuple[bytes, int, int]]
    ) -> None:
        """Tells how many layers of (key, page, num_layers) blocks are computed, of those that were
        reserved to stay in the pool.
        """
        await self._runs.of(lease)
        partial = [
            PartialBlock(key, PoolPage(share.pool_id, page, share.share_id), num_layers)
            for key, page, num_layers in blocks
        ]
        request = kvstore_pb2.ReportLayersRequest(
            lease=lease.to_proto(), blocks=[block.to_proto() for block in partial]
        )
        with typed_errors():
            await self._control.stub.ReportLayers(request, timeout=self._timeout_s)

    def can_map(self, pool_id: int) -> bool:
        """Whether blocks of the pool can be copied without a wait."""
        return self._peers is not None and pool_id in self._peers.mapped

    async def copy_ahead(
        self,
        blocks: Sequence[PartialBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> list[bool]:
        """Copies layers from `first_layers` on, as far as there are, of blocks in pools to their
        target pages. What is there then may be used once `take_pages` has verified it.

        Which of the blocks were copied: those in pools that are mapped now, for no pool is waited
        for. Raises BlockNotFound if a pool is gone. A cancelled call ends once it no longer writes
        the pages.
        """
        pools = {block.pool_page.pool_id for block in blocks}
        mapped = pools.intersection(self._peers_of_pools.mapped)
        for pool_id in mapped:
            of_pool = [i for i, b in enumerate(blocks) if b.pool_page.pool_id == pool_id]
            async with self._peer(pool_id) as peer:
                await self._device.copy_ahead(
                    peer,
                    [blocks[i] for i in of_pool],
                    [targets[i] for i in of_pool],
                    [first_layers[i] for i in of_pool],
                )
        return [block.pool_page.pool_id in mapped for block in blocks]

    async def take_pages(
        self,
        lease: Lease,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int] = (),
        *,
        hinted: Collection[bytes] = (),
    ) -> list[bool]:
        """Copies each block to all of its target pages, and verifies it. Which of them are good.

        Of blocks in pools only layers from `first_layers` on are copied, if given: the others were
        copied ahead.

        The pages of the others have any content. The store is told of those, so that the blocks can
        be written anew, but not of `hinted` keys: it never said that they were there. A cancelled
        call ends once it no longer writes the pages.
        """
        mover = self._pages_mover
        run = await self._runs.of(lease)
        indexes: dict[int, list[int]] = {}
        for index, block in enumerate(blocks):
            indexes.setdefault(block.pool_page.pool_id if block.pool_page else 0, []).append(index)
        slices: list[tuple[int, Sequence[int]]] = []
        for pool_id, of_pool in indexes.items():
            if pool_id:
                slices.append((pool_id, of_pool))
                continue
            for part in mover.blocks_to_take(run.transport, [blocks[i] for i in of_pool]):
                slices.append((0, [of_pool[at] for at in part]))
        taken = await all_ended(
            self._take_slice(
                run,
                mover,
                lease,
                pool_id,
                [blocks[i] for i in part],
                [targets[i] for i in part],
                [first_layers[i] if first_layers else 0 for i in part],
            )
            for pool_id, part in slices
        )
        good = [False] * len(blocks)
        for (_, part), whole in zip(slices, taken, strict=True):
            for index, is_whole in zip(part, whole, strict=True):
                good[index] = is_whole
        for block, is_whole in zip(blocks, good, strict=True):
            if not is_whole and block.key not in hinted:
                await self._drop_damaged(lease, block)
        return good

    async def _take_slice(
        self,
        run: StoreRun,
        mover: PageMover,
        lease: Lease,
        pool_id: int,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> list[bool]:
        size = sum(block.size_bytes for block in blocks)
        if not pool_id:
            with self._measured(run.transport.name, "read", size):
                return await mover.take(run.transport, lease, blocks, targets)
        async with self._peer(pool_id) as peer:
            with self._measured("device", "read", size):
                return await self._device.take_from_peer(peer, blocks, targets, first_layers)

    async def let_go(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Needs blocks in pools no more, so that their workers may have the pages back. Others are
        held until the lease ends.
        """
        await self._runs.of(lease)
        request = kvstore_pb2.LetGoBlocksRequest(lease=lease.to_proto(), keys=list(keys))
        with typed_errors():
            await self._control.stub.LetGoBlocks(request, timeout=self._timeout_s)

    @property
    def _pages_mover(self) -> PageMover:
        if self._mover is None:
            raise RuntimeError("the client was connected without pages")
        return self._mover

    @property
    def _device(self) -> DeviceMover:
        device = self._pages_mover.device
        if device is None:
            raise RuntimeError("the pool is not shared")
        return device

    @property
    def _peers_of_pools(self) -> PeerPools:
        if self._peers is None:
            raise RuntimeError("no pools can be mapped")
        return self._peers

    @asynccontextmanager
    async def _peer(self, pool_id: int) -> AsyncIterator[PeerPool]:
        """A mapped pool. Raises BlockNotFound if it is gone or cannot be read."""
        try:
            async with self._peers_of_pools.lent(pool_id) as peer:
                yield peer
        except OSError as error:
            raise BlockNotFound(f"another worker's pool could not be read: {error}") from error

    async def _use_pools(self, shared: SharesPages, worker_id: str, keeps_blocks: bool) -> None:
        if keeps_blocks:
            await self._share_pool(shared, worker_id)
        self._peers = PeerPools(self._control.stub, shared, self._copier)
        self._peers.start()

    async def _share_pool(self, shared: SharesPages, worker_id: str) -> None:
        try:
            handle = await self._copier.run(shared.pages_handle)
        except OSError as error:
            _log.warning("the pool is not shared, blocks travel by other ways: %s", error)
            return
        except Exception:
            _log.exception("the pool is not shared, blocks travel by other ways")
            return
        self._sharing = PoolSharing(
            self._control.stub, worker_id=worker_id, domain=shared.pool_domain, handle=handle
        )
        self._sharing.start()
