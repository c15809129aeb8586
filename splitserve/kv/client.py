"""A worker's side of one store.

The way of a block that is handed over:

1. the router grants a lease and gives it to both workers;
2. the prefill worker reserves the block, writes it while the lease is vouched for, and commits it
   with its digest (`codec.block_digest`);
3. the decode worker awaits it, copies it out, and checks the digest of its own copy, so that no
   later change in the arena can matter;
4. the router releases the lease.

A store that restarts has a new epoch. The client then connects anew by itself; what was done
under earlier leases ends with LeaseEnded. Every call has a time limit, also when the store is
gone.
"""

from __future__ import annotations

import asyncio
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
from splitserve.kv.control import RPC_TIMEOUT_S, StoreControl, StoreCounts, typed_errors
from splitserve.kv.copier import Copier
from splitserve.kv.layout import (
    BlockSpec,
    KvLayout,
    Lease,
    ReadableBlock,
    Reservation,
    ReservationState,
)
from splitserve.kv.publisher import PoolPublisher
from splitserve.kv.runs import StoreRun, StoreRuns, TransportChoice
from splitserve.kv.transports.base import WriteTooLate
from splitserve.kv.transports.shm import ShmTransport
from splitserve.kv.vouching import Vouching
from splitserve.obs.metrics import Metrics
from splitserve.rpc.tls import TlsConfig
from splitserve.v1 import kvstore_pb2

AWAIT_TIMEOUT_S = 600.0
"""A bound for want of a better one: it is the lease, which someone must renew, that ends a wait."""


class KvStoreClient:
    """Reserves, writes, commits, awaits and reads blocks of one store.

    Make it with `connect`, inside a running event loop, and `close` it. Besides the errors named
    with each method, all raise Unavailable or DeadlineExceeded when the store does not answer,
    and LeaseEnded when the lease is over or of an earlier run of the store.
    """

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
    ) -> KvStoreClient:
        """Introduces the worker to the store at `address`, host:port.

        `worker_id` is unique to one run of the worker's process. `auto` takes shared memory if the
        store's handle socket can be reached from here, that is on the same node, else gRPC.
        Raises InvalidRequest if blocks of `layout` do not fit the store. Transfers are counted in
        `metrics`.
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
        except BaseException:
            await client.close()
            raise
        client._publisher.start()
        return client

    async def close(self) -> None:
        """Ends publishing, closes the channel and gives up the arena."""
        await self._publisher.close()
        await self._control.close()
        self._runs.close()
        await asyncio.to_thread(self._copier.close)

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
        """`shm` or `grpc`."""
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

    async def reserve(self, lease: Lease, blocks: Sequence[BlockSpec]) -> list[Reservation]:
        """Sets space aside, all or nothing; one answer for each block, in order.

        Raises Overloaded when the space is all held, InvalidRequest for impossible blocks.
        """
        await self._runs.of(lease)
        request = kvstore_pb2.ReserveBlocksRequest(
            lease=lease.to_proto(), blocks=[block.to_proto() for block in blocks]
        )
        asked_at = self._vouching.now()
        with typed_errors():
            response = await self._control.stub.ReserveBlocks(request, timeout=self._timeout_s)
        self._vouching.vouched(lease, asked_at)
        return [
            Reservation(ReservationState(answer.state), answer.arena_offset, block.size_bytes)
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
            with suppress(WriteTooLate), self._measured(run, "write", content.nbytes):
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

    async def await_blocks(
        self,
        lease: Lease,
        keys: Sequence[bytes],
        wait_for_writer: bool,
        *,
        timeout_s: float = AWAIT_TIMEOUT_S,
    ) -> AsyncGenerator[tuple[list[ReadableBlock], list[bytes]], None]:
        """Yields (ready, missing) as blocks are decided, until each of `keys` was.

        What is ready is held until the lease ends. With `wait_for_writer` a block that nobody has
        reserved yet is waited for too. The wait ends sooner than `timeout_s` with its lease, with
        LeaseEnded, and with the store. Iterate it under `contextlib.aclosing` if you may leave
        early.
        """
        await self._runs.of(lease)
        request = kvstore_pb2.AwaitBlocksRequest(
            lease=lease.to_proto(), keys=keys, wait_for_writer=wait_for_writer
        )
        with typed_errors():
            call = self._control.stub.AwaitBlocks(request, timeout=timeout_s)
            try:
                async for decided in call:
                    ready = [ReadableBlock.from_proto(block) for block in decided.ready]
                    yield ready, list(decided.missing_keys)
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
            with self._measured(run, "read", block.size_bytes):
                await run.transport.read(lease, block, target, check)
        except BlockCorrupt:
            await self._drop_damaged(lease, block)
            raise

    @contextmanager
    def _measured(self, run: StoreRun, direction: str, size_bytes: int) -> Iterator[None]:
        """Counts a transfer that succeeds."""
        began = time.perf_counter()
        yield
        if self._metrics is not None:
            labels = run.transport.name, direction
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
