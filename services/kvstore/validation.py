"""Checks of what callers send, before any of it reaches the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from services.kvstore.pools import Reach
from splitserve.errors import FieldViolation, InvalidRequest
from splitserve.kv.codec import DIGEST_BYTES
from splitserve.kv.keys import KEY_BYTES
from splitserve.kv.layout import MAX_PART_BYTES, BlockSpec, KvLayout, Lease, PartialBlock, PoolPage
from splitserve.v1 import common_pb2, kvstore_pb2

MAX_KEYS = 65536
"""Most blocks one call may name."""

_MAX_NAME_BYTES = 256
_MAX_HANDLE_BYTES = 4096


def name(field: str, value: str) -> str:
    """A non-empty name of at most 256 characters."""
    if not 0 < len(value) <= _MAX_NAME_BYTES:
        raise InvalidRequest.single(field, f"must have 1 to {_MAX_NAME_BYTES} characters")
    return value


def lease(message: common_pb2.LeaseRef) -> Lease:
    """A lease that is at least named."""
    if not message.lease_id:
        raise InvalidRequest.single("lease.lease_id", "must be set")
    return Lease.from_proto(message)


def leases(messages: Sequence[common_pb2.LeaseRef]) -> list[Lease]:
    """Leases of a renewal or a release."""
    _check_count("leases", len(messages))
    return [Lease.from_proto(message) for message in messages]


def layout(message: common_pb2.KvLayout) -> KvLayout:
    """A layout with a fingerprint of the right length."""
    if len(message.model_fingerprint) != 32:
        raise InvalidRequest.single("kv_layout.model_fingerprint", "must have 32 bytes")
    return KvLayout.from_proto(message)


def keys(field: str, values: Iterable[bytes]) -> list[bytes]:
    """Block keys, each of 32 bytes."""
    checked = list(values)
    _check_count(field, len(checked))
    _raise_if(
        FieldViolation(f"{field}[{at}]", f"must have {KEY_BYTES} bytes")
        for at, key in enumerate(checked)
        if len(key) != KEY_BYTES
    )
    return checked


def specs(messages: Sequence[kvstore_pb2.BlockSpec]) -> list[BlockSpec]:
    """Blocks to reserve."""
    keys("blocks.key", (message.key for message in messages))
    _raise_if(
        FieldViolation(f"blocks[{at}]", "size_bytes and num_tokens must be at least 1")
        for at, message in enumerate(messages)
        if message.size_bytes == 0 or message.num_tokens == 0
    )
    return [BlockSpec.from_proto(message) for message in messages]


def digests(
    messages: Sequence[kvstore_pb2.BlockCommit | kvstore_pb2.DamagedBlock],
) -> list[tuple[bytes, bytes]]:
    """(key, digest) of blocks to commit or to drop."""
    keys("blocks.key", (message.key for message in messages))
    _raise_if(
        FieldViolation(f"blocks[{at}].digest", f"must have {DIGEST_BYTES} bytes")
        for at, message in enumerate(messages)
        if len(message.digest) != DIGEST_BYTES
    )
    return [(message.key, message.digest) for message in messages]


def pool_blocks(message: kvstore_pb2.PoolCommit) -> list[tuple[bytes, bytes, PoolPage]]:
    """(key, digest, page) of blocks that stay in a pool."""
    count = len(message.pages)
    _check_count("in_pool.pages", count)
    for field, value, size in (
        ("keys", message.keys, KEY_BYTES),
        ("digests", message.digests, DIGEST_BYTES),
    ):
        if len(value) != count * size:
            raise InvalidRequest.single(
                f"in_pool.{field}", f"must have {size} bytes for each of {count} pages"
            )
    pool_id, share_id = message.pool_id, message.share_id
    return [
        (key, digest, PoolPage(pool_id, page, share_id))
        for key, digest, page in zip(
            _cut(message.keys, KEY_BYTES),
            _cut(message.digests, DIGEST_BYTES),
            message.pages,
            strict=True,
        )
    ]


def partial_blocks(messages: Sequence[kvstore_pb2.PartialBlock]) -> list[PartialBlock]:
    """How far blocks are."""
    keys("blocks.key", (message.key for message in messages))
    return [PartialBlock.from_proto(message) for message in messages]


def handle(value: bytes) -> bytes:
    """What maps a pool."""
    if not 0 < len(value) <= _MAX_HANDLE_BYTES:
        raise InvalidRequest.single("handle", f"must have 1 to {_MAX_HANDLE_BYTES} bytes")
    return value


def reach(message: kvstore_pb2.AwaitBlocksRequest) -> Reach:
    """Which pools a reader can map."""
    _check_count("unmapped_pool_ids", len(message.unmapped_pool_ids))
    if len(message.pool_domain) > _MAX_NAME_BYTES:
        raise InvalidRequest.single("pool_domain", f"at most {_MAX_NAME_BYTES} characters")
    return Reach(message.pool_domain, frozenset(message.unmapped_pool_ids))


def part(message: kvstore_pb2.WriteBlocksRequest) -> kvstore_pb2.WriteBlocksRequest:
    """One part of a WriteBlocks stream."""
    keys("key", [message.key])
    if len(message.data) > MAX_PART_BYTES:
        raise InvalidRequest.single("data", f"must have at most {MAX_PART_BYTES} bytes")
    return message


def _cut(value: bytes, size: int) -> Iterator[bytes]:
    return (value[at : at + size] for at in range(0, len(value), size))


def _check_count(field: str, count: int) -> None:
    if count > MAX_KEYS:
        raise InvalidRequest.single(field, f"at most {MAX_KEYS} may be named")


def _raise_if(violations: Iterable[FieldViolation]) -> None:
    # A request of many bad fields is not answered with a message as long as itself.
    found = [violation for violation, _ in zip(violations, range(16), strict=False)]
    if found:
        raise InvalidRequest(found)
