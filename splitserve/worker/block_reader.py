"""What a block loader needs of a store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

from splitserve.kv.layout import Lease, PartialBlock, ReadableBlock

Decided = tuple[list[ReadableBlock], list[bytes]]
"""Readable blocks, and the keys of those that are missing."""


class BlockReader(Protocol):
    """The part of `KvStoreClient` that a loader needs."""

    @property
    def transport_name(self) -> str:
        """How bytes travel."""
        ...

    def await_blocks(
        self,
        lease: Lease,
        keys: Seq[bytes],
        wait_for_writer: bool,
        *,
        timeout_s: float,
        partial: list[PartialBlock],
    ) -> AsyncGenerator[Decided, None]:
        """Name each block once it is decided: readable ones, missing ones. Add what is told of
        others to `partial`.
        """
        ...

    def can_map(self, pool_id: int) -> bool:
        """Whether blocks of the pool can be copied without a wait."""
        ...

    async def copy_ahead(
        self, blocks: Seq[PartialBlock], targets: Seq[Seq[int]], first_layers: Seq[int]
    ) -> list[bool]:
        """Copy the layers that there are, but those before the first, to the target pages, without
        waiting for a pool; which of the blocks were copied.
        """
        ...

    async def take_pages(
        self,
        lease: Lease,
        blocks: Seq[ReadableBlock],
        targets: Seq[Seq[int]],
        first_layers: Seq[int],
        *,
        hinted: Collection[bytes],
    ) -> list[bool]:
        """Copy each block, but the layers before the first, to its target pages and verify it;
        which of them are good. Where `hinted` ones are was not the store's word.
        """
        ...

    async def let_go(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Need blocks in pools no more."""
        ...
