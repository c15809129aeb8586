"""What a prefill worker left in its pool, told to the decode worker with the first tokens.

The store is told the same, and stays the one that knows: it decides how long pages are kept and
brings blocks to those who cannot map the pool. The receipt only spares a reader on the same node
two messages through the store between the end of a prefill and its first decode step. It need not
be trusted more than the store's word: a reader digests its own copy either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitserve.errors import InvalidRequest
from splitserve.kv.codec import DIGEST_BYTES
from splitserve.kv.layout import PoolPage
from splitserve.v1 import common_pb2


@dataclass(frozen=True)
class KvReceipt:
    """Whole blocks of one prompt in one pool: page and digest by index in the prompt."""

    pool_id: int
    share_id: int
    blocks: Mapping[int, tuple[int, bytes]]

    def place_of(self, page: int) -> PoolPage:
        """Where a page of it is."""
        return PoolPage(self.pool_id, page, self.share_id)

    def to_proto(self) -> common_pb2.KvReceipt:
        """The message."""
        indexes = sorted(self.blocks)
        return common_pb2.KvReceipt(
            pool_id=self.pool_id,
            share_id=self.share_id,
            block_indexes=indexes,
            pages=[self.blocks[index][0] for index in indexes],
            digests=b"".join(self.blocks[index][1] for index in indexes),
        )

    @classmethod
    def from_proto(cls, message: common_pb2.KvReceipt) -> KvReceipt:
        """The dataclass of a message. Raises InvalidRequest if its lists do not fit together, or a
        block is named twice.
        """
        indexes, pages, digests = message.block_indexes, message.pages, message.digests
        sizes = {len(set(indexes)), len(indexes), len(pages)}
        if len(sizes) > 1 or len(digests) != DIGEST_BYTES * len(indexes):
            raise InvalidRequest.single(
                "kv_receipt",
                f"{len(set(indexes))} blocks, {len(pages)} pages, {len(digests)} bytes of digests",
            )
        each = (digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
        blocks = dict(zip(indexes, zip(pages, each, strict=True), strict=True))
        return cls(message.pool_id, message.share_id, blocks)
