"""What a hand-over needs of a store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

from splitserve.kv.layout import BlockSpec, KvLayout, Lease, Reservation
from splitserve.kv.page_part import PagePart
from splitserve.kv.pool_sharing import PoolShare, ShareListener


class BlockWriter(Protocol):
    """The part of `KvStoreClient` that a hand-over needs."""

    @property
    def transport_name(self) -> str:
        """How bytes travel."""
        ...

    @property
    def layout(self) -> KvLayout:
        """The layout that digests cover."""
        ...

    @property
    def seals_pages(self) -> bool:
        """Whether all blocks have the digests of `seal_pages`."""
        ...

    def open_share(self, listener: ShareListener) -> PoolShare | None:
        """A share for blocks that stay in the pool; None if they cannot."""
        ...

    def close_share(self, share: PoolShare) -> None:
        """Tell its listener nothing more."""
        ...

    async def reserve(
        self, lease: Lease, blocks: Seq[BlockSpec], share: PoolShare | None = None
    ) -> list[Reservation]:
        """Set space aside, all or nothing; with a share, blocks may stay in the pool."""
        ...

    async def put_pages(self, lease: Lease, parts: Seq[PagePart]) -> None:
        """Copy layers of pages into the store; their hashers take them in."""
        ...

    async def report_layers(
        self, lease: Lease, share: PoolShare, blocks: Seq[tuple[bytes, int, int]]
    ) -> None:
        """Tell how many layers of (key, page, num_layers) blocks in the pool are computed."""
        ...

    async def seal_pages(
        self, blocks: Seq[tuple[bytes, int, int]], *, staying: bool
    ) -> list[bytes]:
        """The digests of (key, num_tokens, page) blocks by what is in their pages. Those that are
        `staying` are read there.
        """
        ...

    async def share_pages(
        self, lease: Lease, share: PoolShare, blocks: Seq[tuple[bytes, int, bytes]]
    ) -> None:
        """Commit (key, page, digest) blocks where they are."""
        ...

    async def commit(self, lease: Lease, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        """Make (key, digest) blocks visible."""
        ...

    async def abandon(self, lease: Lease, keys: Iterable[bytes]) -> None:
        """Give blocks up."""
        ...

    async def check_lease(self, lease: Lease) -> None:
        """Raises LeaseEnded if the store says so."""
        ...


OpenStore = Callable[[Lease], Awaitable[BlockWriter]]
