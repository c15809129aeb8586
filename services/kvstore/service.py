"""KvStoreService: messages in, domain calls, messages out.

Raises the suite's typed errors; the server's interceptor turns them into statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc

from services.kvstore import validation
from services.kvstore.block import Block, Reserved, ReserveOutcome
from services.kvstore.directory import Directory
from services.kvstore.pools import SharedKey
from services.kvstore.store import Store
from splitserve.errors import DeadlineExceeded, InvalidRequest
from splitserve.kv.layout import Lease
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

_T = TypeVar("_T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_STATES = {
    ReserveOutcome.WRITE: kvstore_pb2.RESERVATION_STATE_WRITE,
    ReserveOutcome.PRESENT: kvstore_pb2.RESERVATION_STATE_PRESENT,
    ReserveOutcome.BEING_WRITTEN: kvstore_pb2.RESERVATION_STATE_BEING_WRITTEN,
}

_MAX_READY_PER_MESSAGE = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Advertised:
    """What the service tells callers of itself."""

    address: Callable[[], str]
    """host:port under which others reach this store; known once the port is bound."""
    handle_socket: str
    """Where the arena is handed out; empty when shared memory is off."""


class KvStoreService(kvstore_pb2_grpc.KvStoreServiceServicer):
    """The RPCs. `write_idle_s` bounds how long a WriteBlocks stream may say nothing."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        advertised: Advertised,
        *,
        write_idle_s: float = 10.0,
    ) -> None:
        self._store = store
        self._directory = directory
        self._advertised = advertised
        self._write_idle_s = write_idle_s
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Ends the streams that would never end by themselves."""
        self._draining.set()
        self._store.pools.close()

    async def Connect(
        self, request: kvstore_pb2.ConnectRequest, context: Context
    ) -> kvstore_pb2.ConnectResponse:
        """Introduces a worker."""
        validation.name("worker_id", request.worker_id)
        self._store.introduce(validation.layout(request.kv_layout))
        return kvstore_pb2.ConnectResponse(
            epoch=self._store.epoch,
            handle_socket=self._advertised.handle_socket,
            arena_bytes=self._store.arena_bytes,
            advertised_address=self._advertised.address(),
        )

    async def GrantLease(
        self, request: kvstore_pb2.GrantLeaseRequest, context: Context
    ) -> kvstore_pb2.GrantLeaseResponse:
        """Grants a lease."""
        record = self._store.grant(validation.name("owner", request.owner), request.ttl_ms)
        lease = Lease(record.lease_id, self._store.epoch, self._advertised.address())
        return kvstore_pb2.GrantLeaseResponse(lease=lease.to_proto())

    async def RenewLeases(
        self, request: kvstore_pb2.RenewLeasesRequest, context: Context
    ) -> kvstore_pb2.RenewLeasesResponse:
        """Extends leases."""
        ended = self._store.renew(validation.leases(request.leases), request.ttl_ms)
        return kvstore_pb2.RenewLeasesResponse(ended_lease_ids=ended)

    async def ReleaseLeases(
        self, request: kvstore_pb2.ReleaseLeasesRequest, context: Context
    ) -> kvstore_pb2.ReleaseLeasesResponse:
        """Ends leases."""
        self._store.release(validation.leases(request.leases))
        return kvstore_pb2.ReleaseLeasesResponse()

    async def ReserveBlocks(
        self, request: kvstore_pb2.ReserveBlocksRequest, context: Context
    ) -> kvstore_pb2.ReserveBlocksResponse:
        """Sets space aside."""
        lease, specs = validation.lease(request.lease), validation.specs(request.blocks)
        return kvstore_pb2.ReserveBlocksResponse(
            reservations=[
                _reservation(answer)
                for answer in self._store.reserve(lease, specs, request.pool_id)
            ]
        )

    async def WriteBlocks(
        self, request_iterator: AsyncIterator[kvstore_pb2.WriteBlocksRequest], context: Context
    ) -> kvstore_pb2.WriteBlocksResponse:
        """Writes parts of reserved blocks."""
        lease: Lease | None = None
        written = 0
        parts = aiter(request_iterator)
        while True:
            try:
                async with asyncio.timeout(self._write_idle_s):
                    part = validation.part(await anext(parts))
            except StopAsyncIteration:
                return kvstore_pb2.WriteBlocksResponse(written_bytes=written)
            except TimeoutError:
                raise DeadlineExceeded("the stream of parts fell silent") from None
            if lease is None:
                lease = validation.lease(part.lease)
            self._store.write(lease, part.key, part.offset_bytes, part.data)
            written += len(part.data)

    async def CommitBlocks(
        self, request: kvstore_pb2.CommitBlocksRequest, context: Context
    ) -> kvstore_pb2.CommitBlocksResponse:
        """Makes blocks visible."""
        lease = validation.lease(request.lease)
        if not request.HasField("in_pool"):
            self._store.commit(lease, validation.digests(request.blocks))
        elif request.blocks:
            raise InvalidRequest.single("blocks", "must be empty beside in_pool")
        else:
            self._store.share(lease, validation.pool_blocks(request.in_pool))
        return kvstore_pb2.CommitBlocksResponse()

    async def ReportLayers(
        self, request: kvstore_pb2.ReportLayersRequest, context: Context
    ) -> kvstore_pb2.ReportLayersResponse:
        """Tells how far blocks are."""
        lease = validation.lease(request.lease)
        self._store.report(lease, validation.partial_blocks(request.blocks))
        return kvstore_pb2.ReportLayersResponse()

    async def AbandonBlocks(
        self, request: kvstore_pb2.AbandonBlocksRequest, context: Context
    ) -> kvstore_pb2.AbandonBlocksResponse:
        """Gives blocks up."""
        self._store.abandon(validation.lease(request.lease), validation.keys("keys", request.keys))
        return kvstore_pb2.AbandonBlocksResponse()

    async def DropBlocks(
        self, request: kvstore_pb2.DropBlocksRequest, context: Context
    ) -> kvstore_pb2.DropBlocksResponse:
        """Gives up damaged blocks."""
        lease, damaged = validation.lease(request.lease), validation.digests(request.blocks)
        dropped = self._store.drop_damaged(lease, damaged)
        if dropped:
            _log.warning("dropped %d damaged blocks that a reader reported", dropped)
        return kvstore_pb2.DropBlocksResponse(num_dropped=dropped)

    async def AwaitBlocks(
        self, request: kvstore_pb2.AwaitBlocksRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.AwaitBlocksResponse]:
        """Names blocks as they become readable."""
        lease, keys = validation.lease(request.lease), validation.keys("keys", request.keys)
        reach = validation.reach(request)
        awaiter = self._store.start_await(lease, keys, request.wait_for_writer, reach)
        try:
            async for ready, missing in awaiter.batches():
                if partial := awaiter.take_partial():
                    yield kvstore_pb2.AwaitBlocksResponse(
                        partial=[block.to_proto() for block in partial]
                    )
                for start in range(0, max(len(ready), len(missing)), _MAX_READY_PER_MESSAGE):
                    upto = start + _MAX_READY_PER_MESSAGE
                    yield kvstore_pb2.AwaitBlocksResponse(
                        ready=map(_readable, ready[start:upto]), missing_keys=missing[start:upto]
                    )
        finally:
            self._store.stop_await(awaiter)

    async def ReadBlocks(
        self, request: kvstore_pb2.ReadBlocksRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.ReadBlocksResponse]:
        """Reads blocks in parts. The lease is checked anew for each part."""
        lease, keys = validation.lease(request.lease), validation.keys("keys", request.keys)
        for key in keys:
            offset, size = 0, self._store.block_size(lease, key)
            while offset < size:
                data = self._store.read_part(lease, key, offset)
                yield kvstore_pb2.ReadBlocksResponse(key=key, offset_bytes=offset, data=data)
                offset += len(data)

    async def LetGoBlocks(
        self, request: kvstore_pb2.LetGoBlocksRequest, context: Context
    ) -> kvstore_pb2.LetGoBlocksResponse:
        """Ends holds on blocks in pools."""
        self._store.let_go(validation.lease(request.lease), validation.keys("keys", request.keys))
        return kvstore_pb2.LetGoBlocksResponse()

    async def SharePool(
        self, request: kvstore_pb2.SharePoolRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.SharePoolResponse]:
        """Registers a pool for as long as the stream lives."""
        worker_id = validation.name("worker_id", request.worker_id)
        domain = validation.name("domain", request.domain)
        pool = self._store.share_pool(domain, validation.handle(request.handle))
        try:
            _log.info("%s shares its pool", worker_id)
            yield kvstore_pb2.SharePoolResponse(pool_id=pool.pool_id)
            async for gone, wanted in pool.changes():
                yield kvstore_pb2.SharePoolResponse(
                    gone=map(_shared_block, gone), wanted=map(_shared_block, wanted)
                )
        finally:
            self._store.unshare_pool(pool)

    async def WatchPools(
        self, request: kvstore_pb2.WatchPoolsRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.WatchPoolsResponse]:
        """Names the pools of a domain."""
        domain = validation.name("domain", request.domain)
        async with contextlib.aclosing(self._store.pools.watch(domain)) as changes:
            async for pools in changes:
                yield kvstore_pb2.WatchPoolsResponse(
                    pools=[
                        kvstore_pb2.Pool(pool_id=pool.pool_id, handle=pool.handle) for pool in pools
                    ]
                )

    async def LookupBlocks(
        self, request: kvstore_pb2.LookupBlocksRequest, context: Context
    ) -> kvstore_pb2.LookupBlocksResponse:
        """Tells who has how much of a chain; of this store it knows exactly."""
        keys = validation.keys("keys", request.keys)
        lengths = await self._directory.lookup(keys)
        lengths[self._advertised.address()] = self._store.prefix_length(keys)
        return kvstore_pb2.LookupBlocksResponse(
            holders=[
                kvstore_pb2.PrefixHolder(holder_id=holder_id, num_blocks=num_blocks)
                for holder_id, num_blocks in sorted(lengths.items())
                if num_blocks
            ]
        )

    async def PublishBlocks(
        self, request_iterator: AsyncIterator[kvstore_pb2.PublishBlocksRequest], context: Context
    ) -> kvstore_pb2.PublishBlocksResponse:
        """Takes in what a pool has for as long as the stream lives."""
        token: object | None = None
        await context.send_initial_metadata(())
        try:
            async for change in _until(self._draining, request_iterator):
                if token is None:
                    token = self._directory.open(self._holder_id(change))
                added = validation.keys("added_keys", change.added_keys)
                removed = validation.keys("removed_keys", change.removed_keys)
                self._directory.update(token, added, removed)
        finally:
            if token is not None:
                self._directory.close(token)
        return kvstore_pb2.PublishBlocksResponse()

    async def GetStats(
        self, request: kvstore_pb2.GetStatsRequest, context: Context
    ) -> kvstore_pb2.GetStatsResponse:
        """Counts."""
        stats = self._store.stats()
        return kvstore_pb2.GetStatsResponse(
            epoch=stats.epoch,
            live_leases=stats.live_leases,
            committed_blocks=stats.committed_blocks,
            reserved_blocks=stats.reserved_blocks,
            held_blocks=stats.held_blocks,
            used_bytes=stats.used_bytes,
            arena_bytes=stats.arena_bytes,
            directory_entries=self._directory.num_entries,
        )

    def _holder_id(self, change: kvstore_pb2.PublishBlocksRequest) -> str:
        holder_id = validation.name("holder_id", change.holder_id)
        if holder_id == self._advertised.address():
            raise InvalidRequest.single("holder_id", "is this store's own address")
        return holder_id


async def _until(event: asyncio.Event, items: AsyncIterator[_T]) -> AsyncIterator[_T]:
    """The items, until they end or the event is set."""
    stop = asyncio.ensure_future(event.wait())
    try:
        while not event.is_set():
            item = asyncio.ensure_future(anext(items, None))
            try:
                await asyncio.wait({item, stop}, return_when=asyncio.FIRST_COMPLETED)
                received = item.result() if item.done() else None
            finally:
                item.cancel()
            if received is None:
                return
            yield received
    finally:
        stop.cancel()


def _reservation(answer: Reserved) -> kvstore_pb2.Reservation:
    extent = answer.block.extent
    return kvstore_pb2.Reservation(
        state=_STATES[answer.outcome],
        arena_offset=extent.offset if extent else 0,
        in_pool=extent is None,
    )


def _readable(block: Block) -> kvstore_pb2.ReadableBlock:
    place = block.pool
    return kvstore_pb2.ReadableBlock(
        key=block.key,
        arena_offset=block.extent.offset if block.extent else 0,
        size_bytes=block.size_bytes,
        digest=block.digest,
        num_tokens=block.num_tokens,
        pool_page=kvstore_pb2.PoolPage(
            pool_id=place.pool_id, page=place.page, share_id=place.share_id
        )
        if place
        else None,
    )


def _shared_block(shared: SharedKey) -> kvstore_pb2.SharedBlock:
    return kvstore_pb2.SharedBlock(key=shared[0], share_id=shared[1])
