"""What store, workers and router say to each other about blocks and leases.

Plain dataclasses with their proto twins, so that the rest of the code never handles messages.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from splitserve.v1 import common_pb2, kvstore_pb2

MAX_PART_BYTES = 1 << 20
"""Most payload bytes in one message of a WriteBlocks or ReadBlocks stream."""

WRITE_GRACE_S = 0.5
"""How long space stays unused after its writer's lease ended.

A shared-memory writer copies without asking the store. It starts a copy only if the store vouched
for the lease less than half of this ago (`splitserve.kv.client`), so a copy that is in flight when
the lease ends has at least the other half to finish, where it needs about a millisecond. A writer
that is stopped in mid-copy for longer can still damage a block that got the space after it; the
reader's digest finds that. Together with the sweep this stays under one second.
"""


@dataclass(frozen=True)
class KvLayout:
    """What makes two KV blocks interchangeable in size and meaning."""

    model_fingerprint: bytes
    block_tokens: int
    block_bytes: int

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever any field does; part of each block's digest."""
        geometry = self.block_tokens.to_bytes(8, "little") + self.block_bytes.to_bytes(8, "little")
        return hashlib.sha256(b"splitserve-layout-1\0" + geometry + self.model_fingerprint).digest()

    def to_proto(self) -> common_pb2.KvLayout:
        """The message."""
        return common_pb2.KvLayout(
            model_fingerprint=self.model_fingerprint,
            block_tokens=self.block_tokens,
            block_bytes=self.block_bytes,
        )

    @classmethod
    def from_proto(cls, message: common_pb2.KvLayout) -> KvLayout:
        """The dataclass of a message."""
        return cls(message.model_fingerprint, message.block_tokens, message.block_bytes)


@dataclass(frozen=True)
class Lease:
    """A capability to hold blocks in one store until it ends (see LeaseRef)."""

    lease_id: str
    epoch: int
    store_address: str

    def to_proto(self) -> common_pb2.LeaseRef:
        """The message."""
        return common_pb2.LeaseRef(
            lease_id=self.lease_id, epoch=self.epoch, store_address=self.store_address
        )

    @classmethod
    def from_proto(cls, message: common_pb2.LeaseRef) -> Lease:
        """The dataclass of a message."""
        return cls(message.lease_id, message.epoch, message.store_address)


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A block that will be written."""

    key: bytes
    size_bytes: int
    num_tokens: int

    def to_proto(self) -> kvstore_pb2.BlockSpec:
        """The message."""
        return kvstore_pb2.BlockSpec(
            key=self.key, size_bytes=self.size_bytes, num_tokens=self.num_tokens
        )

    @classmethod
    def from_proto(cls, message: kvstore_pb2.BlockSpec) -> BlockSpec:
        """The dataclass of a message."""
        return cls(message.key, message.size_bytes, message.num_tokens)


@dataclass(frozen=True, slots=True)
class PoolPage:
    """A page of a worker's pool. `share_id` is the worker's name for what it shared together."""

    pool_id: int
    page: int
    share_id: int

    def to_proto(self) -> kvstore_pb2.PoolPage:
        """The message."""
        return kvstore_pb2.PoolPage(pool_id=self.pool_id, page=self.page, share_id=self.share_id)

    @classmethod
    def from_proto(cls, message: kvstore_pb2.PoolPage) -> PoolPage:
        """The dataclass of a message."""
        return cls(message.pool_id, message.page, message.share_id)


@dataclass(frozen=True, slots=True)
class PartialBlock:
    """A block in a pool of which the first `num_layers` layers are computed."""

    key: bytes
    pool_page: PoolPage
    num_layers: int

    def to_proto(self) -> kvstore_pb2.PartialBlock:
        """The message."""
        return kvstore_pb2.PartialBlock(
            key=self.key, pool_page=self.pool_page.to_proto(), num_layers=self.num_layers
        )

    @classmethod
    def from_proto(cls, message: kvstore_pb2.PartialBlock) -> PartialBlock:
        """The dataclass of a message."""
        return cls(message.key, PoolPage.from_proto(message.pool_page), message.num_layers)


class ReservationState(IntEnum):
    """What to do with a block that was asked for; numbers are the proto's."""

    WRITE = kvstore_pb2.RESERVATION_STATE_WRITE
    PRESENT = kvstore_pb2.RESERVATION_STATE_PRESENT
    BEING_WRITTEN = kvstore_pb2.RESERVATION_STATE_BEING_WRITTEN


@dataclass(frozen=True, slots=True)
class Reservation:
    """What became of one block that was asked for. `arena_offset` counts for WRITE only, and not
    for a block that stays `in_pool`.
    """

    state: ReservationState
    arena_offset: int
    size_bytes: int
    in_pool: bool = False

    @property
    def must_write(self) -> bool:
        """Whether the caller is the block's writer."""
        return self.state is ReservationState.WRITE


@dataclass(frozen=True, slots=True)
class ReadableBlock:
    """A committed block and where its bytes are: in the arena, unless `pool_page` is set."""

    key: bytes
    arena_offset: int
    size_bytes: int
    digest: bytes
    num_tokens: int
    pool_page: PoolPage | None = None

    def to_proto(self) -> kvstore_pb2.ReadableBlock:
        """The message."""
        return kvstore_pb2.ReadableBlock(
            key=self.key,
            arena_offset=self.arena_offset,
            size_bytes=self.size_bytes,
            digest=self.digest,
            num_tokens=self.num_tokens,
            pool_page=self.pool_page.to_proto() if self.pool_page else None,
        )

    @classmethod
    def from_proto(cls, message: kvstore_pb2.ReadableBlock) -> ReadableBlock:
        """The dataclass of a message."""
        return cls(
            message.key,
            message.arena_offset,
            message.size_bytes,
            message.digest,
            message.num_tokens,
            PoolPage.from_proto(message.pool_page) if message.HasField("pool_page") else None,
        )
