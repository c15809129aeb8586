"""Bytes over gRPC in parts of at most 1 MiB: slower than shared memory, but from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc

from splitserve.errors import BlockCorrupt, Unavailable
from splitserve.kv.control import typed_errors
from splitserve.kv.copier import Copier
from splitserve.kv.layout import MAX_PART_BYTES, Lease, ReadableBlock, Reservation
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

_SLOWEST_BYTES_PER_S = 20e6
"""A transfer slower than this over the whole of a block is given up."""


class GrpcTransport:
    """One stream a transfer; the store checks the lease for every part."""

    name = "grpc"
    needs_vouching = False

    def __init__(
        self, stub: kvstore_pb2_grpc.KvStoreServiceStub, copier: Copier, rpc_timeout_s: float
    ) -> None:
        self._stub = stub
        self._copier = copier
        self._timeout_s = rpc_timeout_s

    async def write(
        self,
        lease: Lease,
        key: bytes,
        reservation: Reservation,
        offset_bytes: int,
        data: memoryview,
        begin_by_s: float,
    ) -> None:
        """See Transport."""
        parts = _parts(lease, key, offset_bytes, data)
        with typed_errors():
            call = self._stub.WriteBlocks(parts, timeout=self._deadline_s(data.nbytes))
            try:
                await call
            except grpc.aio.AioRpcError as err:
                if _broke_while_sending(err):
                    raise Unavailable("the connection to the store broke while sending") from err
                raise
            finally:
                call.cancel()

    async def read(
        self, lease: Lease, block: ReadableBlock, out: memoryview, check: Callable[[], None]
    ) -> None:
        """See Transport."""
        request = kvstore_pb2.ReadBlocksRequest(lease=lease.to_proto(), keys=[block.key])
        received = 0
        with typed_errors():
            call = self._stub.ReadBlocks(request, timeout=self._deadline_s(block.size_bytes))
            try:
                async for part in call:
                    end = received + len(part.data)
                    if part.key != block.key or part.offset_bytes != received or end > out.nbytes:
                        raise BlockCorrupt("the store sent parts that do not fit the block")
                    out[received:end] = part.data
                    received = end
            finally:
                call.cancel()
        if received != block.size_bytes:
            raise BlockCorrupt(f"the store sent {received} of {block.size_bytes} bytes")
        await self._copier.run(check)

    def close(self) -> None:
        """See Transport. The channel is the client's."""

    def _deadline_s(self, size_bytes: int) -> float:
        return self._timeout_s + size_bytes / _SLOWEST_BYTES_PER_S


def _broke_while_sending(err: grpc.aio.AioRpcError) -> bool:
    """grpc.aio reports a part that it could not send before it looks at why the call ended."""
    return err.code() is grpc.StatusCode.INTERNAL and (err.details() or "").startswith(
        "Internal error from Core"
    )


def _parts(
    lease: Lease, key: bytes, offset_bytes: int, data: memoryview
) -> Iterator[kvstore_pb2.WriteBlocksRequest]:
    for start in range(0, data.nbytes, MAX_PART_BYTES):
        yield kvstore_pb2.WriteBlocksRequest(
            lease=lease.to_proto() if start == 0 else None,
            key=key,
            offset_bytes=offset_bytes + start,
            data=bytes(data[start : start + MAX_PART_BYTES]),
        )
