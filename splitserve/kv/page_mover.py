"""Moves blocks between a worker's pages and a store.

Work is cut into slices for the copier's threads: each copies and digests its own, through buffers
that no other process can write to.

1. A writer copies pages to a buffer, the buffer to the arena, and digests the buffer: what is
   committed is the digest of what the pages hold, whatever else is written to the arena.
2. A reader copies the arena to a buffer, digests the buffer, and copies what is whole from there to
   its pages. Digests of pages a device takes of the pages, after the copy. Either way what is used
   is what was verified, whatever becomes of the arena.

A device that reaches the arena by itself needs no buffers: see `device_mover`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TypeVar

import numpy as np

from splitserve.errors import BlockCorrupt
from splitserve.kv.codec import is_digest_of, is_of_page
from splitserve.kv.copier import Copier
from splitserve.kv.device_mover import DeviceMover
from splitserve.kv.layout import KvLayout, Lease, ReadableBlock
from splitserve.kv.page_part import PagePart
from splitserve.kv.pages import PageAccess
from splitserve.kv.staging import Staging
from splitserve.kv.transports.base import Transport
from splitserve.kv.transports.shm import ShmTransport

_SLICE_BYTES = 1 << 20
"""Less than this is not worth a thread of its own."""

_STAGED_BYTES = 4 << 20
"""So much is copied at once, or one block: enough to keep a device busy."""

_T = TypeVar("_T")
_R = TypeVar("_R")


class PageMover:
    """The copies of one worker's pool. To be closed once the copier is."""

    def __init__(self, pages: PageAccess, copier: Copier, layout: KvLayout) -> None:
        self.pages = pages
        self._copier = copier
        self._layout = layout
        self._staging = Staging(pages, max(_STAGED_BYTES, layout.block_bytes))
        shared = pages.shared
        self.device = (
            DeviceMover(shared, pages.layer_bytes, copier, layout) if shared is not None else None
        )

    def prepare(self, transport: Transport) -> None:
        """Begins with what the first copies would have to wait for."""
        if self.device is not None:
            self.device.prepare(transport)

    def close(self) -> None:
        """Gives up the buffers, in the calling thread: with a device it may take a while."""
        self._staging.close()
        if self.device is not None:
            self.device.close()

    def slices(self, items: Sequence[_T], item_bytes: int) -> list[Sequence[_T]]:
        """The items cut up for the threads, in order."""
        worthwhile = -(-len(items) * item_bytes // _SLICE_BYTES)
        count = max(1, min(self._copier.threads, worthwhile, len(items)))
        bounds = [at * len(items) // count for at in range(count + 1)]
        return [items[first:end] for first, end in pairwise(bounds)]

    def parts_to_put(
        self, transport: Transport, parts: Sequence[PagePart]
    ) -> list[Sequence[PagePart]]:
        """Parts cut up as they are to be put: what a device takes stays together."""
        if self.device is not None and self.device.reaches(transport):
            return [parts]
        return self.slices(parts, max(map(self.size_of, parts), default=1))

    def blocks_to_take(
        self, transport: Transport, blocks: Sequence[ReadableBlock]
    ) -> list[Sequence[int]]:
        """Blocks in the arena, by index, cut up as they are to be taken: what a device takes stays
        together.
        """
        reaches = self.device is not None and self.device.reaches(transport)
        by_device = [i for i, b in enumerate(blocks) if reaches and is_of_page(b.digest)]
        others = [i for i, b in enumerate(blocks) if not (reaches and is_of_page(b.digest))]
        slices = self.slices(others, self._layout.block_bytes) if others else []
        return [by_device, *slices] if by_device else slices

    def size_of(self, part: PagePart) -> int:
        """Bytes of a part."""
        return (part.end_layer - part.first_layer) * self.pages.layer_bytes

    async def put(
        self, transport: Transport, lease: Lease, parts: Sequence[PagePart], begin_by_s: float
    ) -> int:
        """Writes parts. How many, from the first: no copy to the arena begins after `begin_by_s`,
        and the others' hashers have taken in nothing. What is raised is that of `Transport.write`.
        """
        if self.device is not None:
            num_put = await self.device.put(transport, parts, begin_by_s)
            if num_put is not None:
                return num_put
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
        """Copies each block to its own pages. Which of them are whole; the pages of the others have
        any content.
        """
        if self.device is not None and all(is_of_page(block.digest) for block in blocks):
            taken = await self.device.take(transport, blocks, targets)
            if taken is not None:
                return taken
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
        for (first, end), group in groupby(together, lambda one: one[0].layers):
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
        sealed = [self.device is not None and is_of_page(block.digest) for block in blocks]
        whole = [
            is_sealed or is_digest_of(block.digest, block.key, block.num_tokens, fingerprint, view)
            for block, view, is_sealed in zip(blocks, views, sealed, strict=True)
        ]
        together = [
            (page, view)
            for view, pages, is_whole in zip(views, targets, whole, strict=True)
            if is_whole
            for page in pages
        ]
        self.pages.insert_pages([page for page, _ in together], [view for _, view in together])
        if self.device is not None and any(sealed):
            # A device digests them where they are now.
            places = [at for at, is_sealed in enumerate(sealed) if is_sealed]
            digested = self.device.whole([blocks[i] for i in places], [targets[i] for i in places])
            for at, is_whole in zip(places, digested, strict=True):
                whole[at] = is_whole
        return whole


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
        if part.hasher is not None:
            part.hasher.update(view)


def _unchecked() -> None:
    """The copy is checked in the thread that inserts it."""
