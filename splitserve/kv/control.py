"""The parts of a store that need no arena: leases, lookups, counts. All that a router uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from splitserve.kv.layout import Lease
from splitserve.rpc.channel import open_channel
from splitserve.rpc.status import error_from_rpc
from splitserve.rpc.tls import TlsConfig
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

RPC_TIMEOUT_S = 2.0


@contextmanager
def typed_errors() -> Iterator[None]:
    """Raises the suite's errors for those of gRPC."""
    try:
        yield
    except grpc.aio.AioRpcError as err:
        raise error_from_rpc(err) from err


@dataclass(frozen=True)
class StoreCounts:
    """What a store holds; see GetStatsResponse."""

    epoch: int
    live_leases: int
    committed_blocks: int
    reserved_blocks: int
    held_blocks: int
    used_bytes: int
    arena_bytes: int
    directory_entries: int


class StoreControl:
    """One store's leases and lookups, over one channel that reconnects by itself.

    Every call ends within `rpc_timeout_s` and raises Unavailable or DeadlineExceeded if the store
    does not answer.
    """

    def __init__(
        self, address: str, *, tls: TlsConfig | None = None, rpc_timeout_s: float = RPC_TIMEOUT_S
    ) -> None:
        self.address = address
        self._timeout_s = rpc_timeout_s
        self._channel = open_channel(address, tls=tls)
        self.stub = kvstore_pb2_grpc.KvStoreServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Closes the channel; calls in flight end as cancelled."""
        await self._channel.close(grace=None)

    async def grant_lease(self, owner: str, ttl_ms: int) -> Lease:
        """A lease that ends in `ttl_ms` unless renewed. Raises Overloaded, InvalidRequest."""
        request = kvstore_pb2.GrantLeaseRequest(owner=owner, ttl_ms=ttl_ms)
        with typed_errors():
            response = await self.stub.GrantLease(request, timeout=self._timeout_s)
        return Lease.from_proto(response.lease)

    async def renew(self, leases: Sequence[Lease], ttl_ms: int) -> list[str]:
        """Extends leases to at least `ttl_ms` from now. Ids of those that had ended."""
        request = kvstore_pb2.RenewLeasesRequest(
            leases=[lease.to_proto() for lease in leases], ttl_ms=ttl_ms
        )
        with typed_errors():
            response = await self.stub.RenewLeases(request, timeout=self._timeout_s)
        return list(response.ended_lease_ids)

    async def release(self, leases: Sequence[Lease]) -> None:
        """Ends leases now. One that has ended already is no error."""
        request = kvstore_pb2.ReleaseLeasesRequest(leases=[lease.to_proto() for lease in leases])
        with typed_errors():
            await self.stub.ReleaseLeases(request, timeout=self._timeout_s)

    async def lookup(self, keys: Sequence[bytes]) -> dict[str, int]:
        """For each holder of the chain's first block, how many it has without a gap."""
        request = kvstore_pb2.LookupBlocksRequest(keys=keys)
        with typed_errors():
            response = await self.stub.LookupBlocks(request, timeout=self._timeout_s)
        return {holder.holder_id: holder.num_blocks for holder in response.holders}

    async def stats(self) -> StoreCounts:
        """Counts what the store holds."""
        with typed_errors():
            counts = await self.stub.GetStats(
                kvstore_pb2.GetStatsRequest(), timeout=self._timeout_s
            )
        return StoreCounts(
            epoch=counts.epoch,
            live_leases=counts.live_leases,
            committed_blocks=counts.committed_blocks,
            reserved_blocks=counts.reserved_blocks,
            held_blocks=counts.held_blocks,
            used_bytes=counts.used_bytes,
            arena_bytes=counts.arena_bytes,
            directory_entries=counts.directory_entries,
        )
