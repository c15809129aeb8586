"""Moves blocks between a worker's pages and a store.

Work is cut into slices for the copier's threads: each copies and digests its own, through buffers
that no other process can write to.

1. A writer copies pages to a buffer, the buffer to the arena, and digests the buffer: what is
   committed is the digest of what the pages hold, whatever else is written to the arena.
2. A reader copies the arena to a buffer, digests the buffer, and copies what is whole from there to
   its pages: what it uses is what it verified, whatever becomes of the arena, and a page that a
   damaged block was meant for is not touched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TypeVar

import numpy as np

from splitserve.errors import BlockCorrupt
from splitserve.kv.codec import BlockHasher, block_digest, sealed_digest
from splitserve.kv.copier import Copier
from splitserve.kv.layout import (
    KvLayout,
    Lease,
    PartialBlock,
    PoolPage,
    ReadableBlock,
    Reservation,
)
from splitserve.kv.pages import LayerRun, PageAccess, PeerPool, SharesPages
from splitserve.kv.staging import Staging
from splitserve.kv.transports.base import Transport
from splitserve.kv.transports.shm import ShmTransport

_SLICE_BYTES = 1 << 20
"""Less than this is not worth a thread of its own."""

_STAGED_BYTES = 4 << 20
"""So much is copied at once, or one block: enough to keep a device busy."""

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class PagePart:
    """Layers [first_layer, end_layer) of a page, to be written to a reserved block. `hasher` has
    taken in the layers before, and takes in these.
    """

    key: bytes
    reservation: Reservation
    page: int
    first_layer: int
    end_layer: int
    hasher: BlockHasher


class PageMover:
    """The copies of one worker's pool. To be closed once the copier is."""

    def __init__(self, pages: PageAccess, copier: Copier, layout: KvLayout) -> None:
        self.pages = pages
        self._copier = copier
        self._layout = layout
        self._staging = Staging(pages, max(_STAGED_BYTES, layout.block_bytes))

    def close(self) -> None:
        """Gives up the buffers, in the calling thread: with a device it may take a while."""
        self._staging.close()

    def slices(self, items: Sequence[_T], item_bytes: int) -> list[Sequence[_T]]:
        """The items cut up for the threads, in order."""
        worthwhile = -(-len(items) * item_bytes // _SLICE_BYTES)
        count = max(1, min(self._copier.threads, worthwhile, len(items)))
        bounds = [at * len(items) // count for at in range(count + 1)]
        return [items[first:end] for first, end in pairwise(bounds)]

    def size_of(self, part: PagePart) -> int:
        """Bytes of a part."""
        return (part.end_layer - part.first_layer) * self.pages.layer_bytes

    async def put(
        self, transport: Transport, lease: Lease, parts: Sequence[PagePart], begin_by_s: float
    ) -> int:
        """Writes parts. How many, from the first: no copy to the arena begins after `begin_by_s`,
        and the others' hashers have taken in nothing. What is raised is that of `Transport.write`.
        """
        if isinstance(transport, ShmTransport):
            spans = [
                transport.span(
                    part.reservation.arena_offset + self._offset_of(part), self.size_of(part)
                )
                for part in parts
            ]
            return await self._copier.run(self._export_to_arena, parts, spans, begin_by_s)
        views = [memoryview(bytearray(self.size_of(part))) for part in parts]
        await self._copier.run(self._export, parts, views)
        await all_ended(
            transport.write(
                lease, part.key, part.reservation, self._offset_of(part), view, begin_by_s
            )
            for part, view in zip(parts, views, strict=True)
        )
        await self._copier.run(_take_in, parts, views)
        return len(parts)

    async def take(
        self,
        transport: Transport,
        lease: Lease,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
    ) -> list[bool]:
        """Copies each block that is whole to its own pages. Which of them are; the pages of the
        others stay as they are.
        """
        if isinstance(transport, ShmTransport):
            spans = [transport.span(block.arena_offset, block.size_bytes) for block in blocks]
            return await self._copier.run(self._insert_from_arena, blocks, spans, targets)
        whole = []
        buffer = memoryview(bytearray(self._layout.block_bytes))
        for block, pages in zip(blocks, targets, strict=True):
            try:
                await transport.read(lease, block, buffer, _unchecked)
            except BlockCorrupt:
                whole.append(False)
                continue
            whole += await self._copier.run(self._insert, [block], [buffer], [pages])
        return whole

    async def take_from_peer(
        self,
        shared: SharesPages,
        peer: PeerPool,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> list[bool]:
        """Copies each block from its page of the peer, from its first layer on, to own pages. Which
        of them are whole.
        """
        return await self._copier.run(
            self._take_from_peer, shared, peer, blocks, targets, first_layers
        )

    async def copy_ahead(
        self,
        shared: SharesPages,
        peer: PeerPool,
        blocks: Sequence[PartialBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> None:
        """Copies what there is of each block, from its first layer on, and checks nothing."""
        places = [block.pool_page for block in blocks]
        runs = _runs(places, targets, first_layers, [block.num_layers for block in blocks])
        await self._copier.run(shared.copy_from_peer, peer, runs)

    async def seal(
        self, shared: SharesPages, blocks: Sequence[tuple[bytes, int, int]]
    ) -> list[bytes]:
        """The digests of (key, num_tokens, page) blocks that stay in the pool."""
        pages = [page for _, _, page in blocks]
        digests = await self._copier.run(shared.digest_pages, pages)
        return [
            self._sealed(key, num_tokens, digest)
            for (key, num_tokens, _), digest in zip(blocks, digests, strict=True)
        ]

    def _offset_of(self, part: PagePart) -> int:
        return part.first_layer * self.pages.layer_bytes

    # -- in a thread of the copier -------------------------------------------------------------

    def _export_to_arena(
        self, parts: Sequence[PagePart], spans: Sequence[memoryview], begin_by_s: float
    ) -> int:
        written = 0
        with self._staging.lent() as buffer:
            fitting = len(buffer) // max(map(self.size_of, parts))
            for together in _batches(list(zip(parts, spans, strict=True)), fitting):
                members = [part for part, _ in together]
                views = _cut(buffer, [self.size_of(part) for part in members])
                self._export(members, views)
                # Looked at here, for the thread and the device may have let it wait.
                if time.monotonic() >= begin_by_s:
                    break
                for (_, span), view in zip(together, views, strict=True):
                    _copy(span, view)
                _take_in(members, views)
                written += len(members)
        return written

    def _export(self, parts: Sequence[PagePart], views: Sequence[memoryview]) -> None:
        together = zip(parts, views, strict=True)
        for (first, end), group in groupby(together, lambda one: _layers_of(one[0])):
            members = list(group)
            self.pages.export_pages(
                [part.page for part, _ in members], first, end, [view for _, view in members]
            )

    def _insert_from_arena(
        self,
        blocks: Sequence[ReadableBlock],
        spans: Sequence[memoryview],
        targets: Sequence[Sequence[int]],
    ) -> list[bool]:
        whole: list[bool] = []
        with self._staging.lent() as buffer:
            fitting = len(buffer) // self._layout.block_bytes
            for together in _batches(list(zip(blocks, spans, targets, strict=True)), fitting):
                views = _cut(buffer, [self._layout.block_bytes] * len(together))
                for (_, span, _), view in zip(together, views, strict=True):
                    _copy(view, span)
                members, pages = [one[0] for one in together], [one[2] for one in together]
                whole += self._insert(members, views, pages)
        return whole

    def _insert(
        self,
        blocks: Sequence[ReadableBlock],
        views: Sequence[memoryview],
        targets: Sequence[Sequence[int]],
    ) -> list[bool]:
        """The views are of this process alone."""
        fingerprint = self._layout.fingerprint
        whole = [
            block_digest(block.key, block.num_tokens, fingerprint, view) == block.digest
            for block, view in zip(blocks, views, strict=True)
        ]
        together = [
            (page, view)
            for view, pages, is_whole in zip(views, targets, whole, strict=True)
            if is_whole
            for page in pages
        ]
        self.pages.insert_pages([page for page, _ in together], [view for _, view in together])
        return whole

    def _take_from_peer(
        self,
        shared: SharesPages,
        peer: PeerPool,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> list[bool]:
        """Digests its own copies: the peer's pages may be gone at any time."""
        num_layers = self._layout.block_bytes // self.pages.layer_bytes
        places = [block.pool_page for block in blocks]
        runs = _runs(places, targets, first_layers, [num_layers] * len(blocks))
        own = [page for pages in targets for page in pages]
        copied = [block for block, pages in zip(blocks, targets, strict=True) for _ in pages]
        whole = {block.key: True for block in blocks}
        for block, digest in zip(copied, shared.copy_from_peer(peer, runs, own), strict=True):
            whole[block.key] &= self._sealed(block.key, block.num_tokens, digest) == block.digest
        return [whole[block.key] for block in blocks]

    def _sealed(self, key: bytes, num_tokens: int, page_digest: bytes) -> bytes:
        layout = self._layout
        return sealed_digest(key, num_tokens, layout.fingerprint, layout.block_bytes, page_digest)


async def all_ended(works: Iterable[Awaitable[_R]]) -> list[_R]:
    """All results, once every one has ended, also when cancelled: nothing touches memory after.
    Raises the first fault.
    """
    ended = await asyncio.gather(*works, return_exceptions=True)
    results = []
    for result in ended:
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


def _runs(
    places: Sequence[PoolPage | None],
    targets: Sequence[Sequence[int]],
    first_layers: Sequence[int],
    end_layers: Sequence[int],
) -> list[LayerRun]:
    """One for all of the same layers. What is in no pool is left out."""
    together: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for place, own, first, end in zip(places, targets, first_layers, end_layers, strict=True):
        if place is not None and first < end:
            pages, own_pages = together.setdefault((first, end), ([], []))
            pages += [place.page] * len(own)
            own_pages += own
    return [LayerRun(*pages, *layers) for layers, pages in together.items()]


def _layers_of(part: PagePart) -> tuple[int, int]:
    return part.first_layer, part.end_layer


def _batches(items: Sequence[_T], count: int) -> Iterator[Sequence[_T]]:
    for first in range(0, len(items), count):
        yield items[first : first + count]


def _cut(buffer: memoryview, sizes: Iterable[int]) -> list[memoryview]:
    """Views of the buffer, one after the other."""
    bounds = [0, *accumulate(sizes)]
    return [buffer[first:end] for first, end in pairwise(bounds)]


def _copy(target: memoryview, source: memoryview) -> None:
    """Of the same size. Without the interpreter's lock."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def _take_in(parts: Sequence[PagePart], views: Sequence[memoryview]) -> None:
    for part, view in zip(parts, views, strict=True):
        part.hasher.update(view)


def _unchecked() -> None:
    """The copy is checked in the thread that inserts it."""
