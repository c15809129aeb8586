"""Blocks of one store as bytes: leases, reservations, writes, commits, waits and reads.

A store that restarts has a new epoch. The client then connects anew by itself; what was done
under earlier leases ends with LeaseEnded. Every call has a time limit, also when the store is
gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from splitserve.errors import (
    BlockCorrupt,
    BlockOutOfRange,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from splitserve.kv.codec import block_digest, verify_block
from splitserve.kv.control import StoreControl, StoreCounts, typed_errors
from splitserve.kv.copier import Copier
from splitserve.kv.layout import (
    BlockSpec,
    KvLayout,
    Lease,
    PartialBlock,
    ReadableBlock,
    Reservation,
    ReservationState,
)
from splitserve.kv.peer_pools import PeerPools
from splitserve.kv.pool_sharing import PoolShare
from splitserve.kv.publisher import PoolPublisher
from splitserve.kv.runs import StoreRun, StoreRuns
from splitserve.kv.transports.base import WriteTooLate
from splitserve.kv.transports.shm import ShmTransport
from splitserve.kv.vouching import Vouching
from splitserve.obs.metrics import Metrics
from splitserve.v1 import kvstore_pb2

_log = logging.getLogger(__name__)

AWAIT_TIMEOUT_S = 600.0
"""A bound for want of a better one: it is the lease, which someone must renew, that ends a wait."""


class BlockClient:
    """Reserves, writes, commits, awaits and reads blocks of one store.

    Besides the errors named with each method, all raise Unavailable or DeadlineExceeded when the
    store does not answer, and LeaseEnded when the lease is over or of an earlier run of the store.
    """

    _peers: PeerPools | None = None
    """Other workers' pools that this one can map."""

    def __init__(
        self,
        control: StoreControl,
        copier: Copier,
        runs: StoreRuns,
        *,
        worker_id: str,
        layout: KvLayout,
        rpc_timeout_s: float,
        metrics: Metrics | None,
    ) -> None:
        self.layout = layout
        self._control = control
        self._copier = copier
        self._runs = runs
        self._timeout_s = rpc_timeout_s
        self._metrics = metrics
        self._vouching = Vouching(control)
        self._publisher = PoolPublisher(control.stub, worker_id, on_broken=runs.lost)

    @property
    def address(self) -> str:
        """Where the store is, host:port."""
        return self._control.address

    @property
    def reachable(self) -> bool:
        """Whether the store was there when last heard of; it is watched all the time."""
        return self._publisher.reachable

    @property
    def advertised_address(self) -> str:
        """Where everyone else reaches the store, host:port; what its leases name."""
        return self._runs.present.advertised_address or self.address

    @property
    def epoch(self) -> int:
        """The run of the store that this client last connected to."""
        return self._runs.present.epoch

    @property
    def transport_name(self) -> str:
        """`shm` or `grpc`: how bytes travel that do not stay in a pool."""
        return self._runs.present.transport.name

    @property
    def arena(self) -> memoryview | None:
        """The mapped arena of the present run, None without shared memory."""
        transport = self._runs.present.transport
        return transport.arena if isinstance(transport, ShmTransport) else None

    async def grant_lease(self, owner: str, ttl_ms: int) -> Lease:
        """See StoreControl.grant_lease."""
        return await self._control.grant_lease(owner, ttl_ms)

    async def renew(self, leases: Sequence[Lease], ttl_ms: int) -> list[str]:
        """See StoreControl.renew."""
        return await self._control.renew(leases, ttl_ms)

    async def release(self, leases: Sequence[Lease]) -> None:
        """See StoreControl.release."""
        await self._control.release(leases)

    async def lookup(self, keys: Sequence[bytes]) -> dict[str, int]:
        """See StoreControl.lookup."""
        return await self._control.lookup(keys)

    async def stats(self) -> StoreCounts:
        """See StoreControl.stats."""
        return await self._control.stats()

    def publish(self, added: Iterable[bytes] = (), removed: Iterable[bytes] = ()) -> None:
        """See PoolPublisher.publish."""
        self._publisher.publish(added, removed)

    async def reserve(
        self, lease: Lease, blocks: Sequence[BlockSpec], share: PoolShare | None = None
    ) -> list[Reservation]:
        """Sets space aside, all or nothing; one answer for each block, in order. With a share,
        blocks may be answered to stay in the pool.

        Raises Overloaded when the space is all held, InvalidRequest for impossible blocks.
        """
        await self._runs.of(lease)
        request = kvstore_pb2.ReserveBlocksRequest(
            lease=lease.to_proto(),
            blocks=[block.to_proto() for block in blocks],
            pool_id=share.pool_id if share else 0,
        )
        asked_at = self._vouching.now()
        with typed_errors():
            response = await self._control.stub.ReserveBlocks(request, timeout=self._timeout_s)
        self._vouching.vouched(lease, asked_at)
        return [
            Reservation(
                ReservationState(answer.state),
                answer.arena_offset,
                block.size_bytes,
                answer.in_pool,
            )
            for answer, block in zip(response.reservations, blocks, strict=True)
        ]

    async def write(
        self,
        lease: Lease,
        key: bytes,
        reservation: Reservation,
        offset_bytes: int,
        data: memoryview,
    ) -> None:
        """Copies `data` to `offset_bytes` of a block that was reserved as WRITE.

        `data` must be contiguous and stay as it is until the call ends. Raises BlockOutOfRange if
        it reaches past the block's end. A cancelled call ends once it no longer reads `data`.
        """
        if not reservation.must_write:
            raise InvalidRequest.single("reservation", "the block is not this worker's to write")
        content = data.cast("B")
        if offset_bytes < 0 or offset_bytes + content.nbytes > reservation.size_bytes:
            raise BlockOutOfRange(
                f"[{offset_bytes}, {offset_bytes + content.nbytes}) of a block of "
                f"{reservation.size_bytes} bytes"
            )
        run = await self._runs.of(lease)
        written = content.nbytes == 0
        while not written:
            begin_by_s = await self._vouched_until(run, lease)
            # Too late, and the store is asked anew whether the lease is live.
            with (
                suppress(WriteTooLate),
                self._measured(run.transport.name, "write", content.nbytes),
            ):
                await run.transport.write(
                    lease, key, reservation, offset_bytes, content, begin_by_s
                )
                written = True

    async def digest(self, key: bytes, num_tokens: int, content: memoryview) -> bytes:
        """`codec.block_digest` of a whole block of this layout, off the event loop."""
        return await self._copier.run(
            block_digest, key, num_tokens, self.layout.fingerprint, content
        )

    async def commit(self, lease: Lease, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        """Makes (key, digest) blocks visible, all or none. Doing it twice is no error."""
        await self._runs.of(lease)
        request = kvstore_pb2.CommitBlocksRequest(
            lease=lease.to_proto(),
            blocks=[kvstore_pb2.BlockCommit(key=key, digest=digest) for key, digest in blocks],
        )
        with typed_errors():
            await self._control.stub.CommitBlocks(request, timeout=self._timeout_s)

    async def abandon(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Gives up reserved blocks; who awaits them is told that they are missing."""
        await self._runs.of(lease)
        request = kvstore_pb2.AbandonBlocksRequest(lease=lease.to_proto(), keys=list(keys))
        with typed_errors():
            await self._control.stub.AbandonBlocks(request, timeout=self._timeout_s)

    async def check_lease(self, lease: Lease) -> None:
        """Asks the store whether the lease is live; does not extend it."""
        await self._vouching.ask(lease)

    async def await_blocks(
        self,
        lease: Lease,
        keys: Sequence[bytes],
        wait_for_writer: bool,
        *,
        timeout_s: float = AWAIT_TIMEOUT_S,
        partial: list[PartialBlock] | None = None,
    ) -> AsyncGenerator[tuple[list[ReadableBlock], list[bytes]], None]:
        """Yields (ready, missing) as blocks are decided, until each of `keys` was.

        What is ready is held until the lease ends. With `wait_for_writer` a block that nobody has
        reserved yet is waited for too. The wait ends sooner than `timeout_s` with its lease, with
        LeaseEnded, and with the store. What is told meanwhile of blocks that are partly computed,
        in pools within reach, is added to `partial`, if given, and something is yielded. Iterate it
        under `contextlib.aclosing` if you may leave early.
        """
        await self._runs.of(lease)
        asked, beyond = list(keys), set[int]()
        while asked:
            # A pool may yet be named, but not to this call.
            unmapped = beyond.union(self._peers.unmapped) if self._peers else beyond
            request = kvstore_pb2.AwaitBlocksRequest(
                lease=lease.to_proto(),
                keys=asked,
                wait_for_writer=wait_for_writer,
                pool_domain=self._peers.domain if self._peers else "",
                unmapped_pool_ids=unmapped,
            )
            asked = []
            with typed_errors():
                call = self._control.stub.AwaitBlocks(request, timeout=timeout_s)
                try:
                    async for decided in call:
                        ready = [ReadableBlock.from_proto(block) for block in decided.ready]
                        places = {b.pool_page.pool_id for b in ready if b.pool_page}
                        beyond |= await self._beyond_reach(places - beyond)
                        at_hand = [block for block in ready if _pool_of(block) not in beyond]
                        # The store is asked for the others anew: it has them brought here.
                        asked += [block.key for block in ready if _pool_of(block) in beyond]
                        news = partial is not None and len(decided.partial) > 0
                        if partial is not None:
                            partial += map(PartialBlock.from_proto, decided.partial)
                        if at_hand or decided.missing_keys or news:
                            yield at_hand, list(decided.missing_keys)
                finally:
                    call.cancel()

    async def read(self, lease: Lease, block: ReadableBlock, out: memoryview) -> None:
        """Copies a block to `out` and checks the copy. `out` is valid only if this returns.

        `out` is contiguous, writable, exactly the block's size. Raises BlockCorrupt if the content
        is not that of the block's identity; the store is told, so that the block can be written
        anew. A cancelled call ends once it no longer writes `out`.
        """
        target = out.cast("B")
        if target.nbytes != block.size_bytes or target.readonly:
            raise InvalidRequest.single("out", f"must be {block.size_bytes} writable bytes")
        run = await self._runs.of(lease)
        check = partial(
            verify_block,
            block.key,
            block.num_tokens,
            self.layout.fingerprint,
            target,
            block.digest,
        )
        try:
            with self._measured(run.transport.name, "read", block.size_bytes):
                await run.transport.read(lease, block, target, check)
        except BlockCorrupt:
            await self._drop_damaged(lease, block)
            raise

    async def _beyond_reach(self, pool_ids: Iterable[int]) -> set[int]:
        """Those of the pools that cannot be mapped now."""
        if self._peers is None:
            return set(pool_ids)
        asked = list(pool_ids)
        reached = await asyncio.gather(*map(self._peers.reaches, asked))
        return {pool_id for pool_id, is_there in zip(asked, reached, strict=True) if not is_there}

    @contextmanager
    def _measured(self, transport: str, direction: str, size_bytes: int) -> Iterator[None]:
        """Counts a transfer that succeeds."""
        began = time.perf_counter()
        yield
        if self._metrics is not None:
            labels = transport, direction
            self._metrics.kv_transfer_bytes.labels(*labels).inc(size_bytes)
            self._metrics.kv_transfer_seconds.labels(*labels).observe(time.perf_counter() - began)

    async def _vouched_until(self, run: StoreRun, lease: Lease) -> float:
        return await self._vouching.ensure(lease) if run.transport.needs_vouching else math.inf

    async def _drop_damaged(self, lease: Lease, block: ReadableBlock) -> None:
        """Has the store give up a damaged block, so that its key is not damaged for good.

        Raises LeaseEnded if there may be no damage: the block went with its lease while it was
        copied. A store that does not answer keeps the block until the next reader finds it.
        """
        request = kvstore_pb2.DropBlocksRequest(
            lease=lease.to_proto(),
            blocks=[kvstore_pb2.DamagedBlock(key=block.key, digest=block.digest)],
        )
        with suppress(Unavailable, DeadlineExceeded), typed_errors():
            await self._control.stub.DropBlocks(request, timeout=self._timeout_s)


def _pool_of(block: ReadableBlock) -> int:
    """0 for a block in the arena."""
    return block.pool_page.pool_id if block.pool_page else 0
