"""Moves blocks by a device that reaches other pools of its node, and the arena, by itself.

What is digested, and used, are the device's own pages after the copy: nobody else can write there,
whatever becomes of the memory that they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Concatenate, ParamSpec, TypeVar

from splitserve.kv.codec import sealed_digest
from splitserve.kv.copier import Copier
from splitserve.kv.device_arenas import DeviceArenas
from splitserve.kv.layout import KvLayout, PartialBlock, PoolPage, ReadableBlock
from splitserve.kv.page_part import PagePart
from splitserve.kv.pages import HostPool, LayerRun, PeerPool, SharesPages
from splitserve.kv.transports.base import Transport

_P = ParamSpec("_P")
_R = TypeVar("_R")


class DeviceMover:
    """The copies of one worker's pool, in the copier's threads. To be closed once that is."""

    def __init__(
        self, pages: SharesPages, layer_bytes: int, copier: Copier, layout: KvLayout
    ) -> None:
        self.pages = pages
        self._num_layers = layout.block_bytes // layer_bytes
        self._copier = copier
        self._layout = layout
        self._arenas = DeviceArenas(pages, copier)

    def prepare(self, transport: Transport) -> None:
        """Begins to compile, and to map the arena if it has one."""
        if not self.reaches(transport):
            self._copier.later(self.pages.prepare_pages)

    def close(self) -> None:
        """Gives up arenas, in the calling thread: it may take a while."""
        self._arenas.close()

    def reaches(self, transport: Transport) -> bool:
        """Whether the device copies to and from the arena by itself."""
        return self._arenas.of(transport) is not None

    async def put(
        self, transport: Transport, parts: Sequence[PagePart], begin_by_s: float
    ) -> int | None:
        """See `PageMover.put`; None if it must go another way, for a hasher to see it or because
        the device does not reach the arena.
        """
        if any(part.hasher is not None for part in parts):
            return None
        return await self._with_arena(transport, self._put, parts, begin_by_s)

    async def take(
        self,
        transport: Transport,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
    ) -> list[bool] | None:
        """See `PageMover.take`, of blocks that have digests of pages; None: they must go another
        way.
        """
        return await self._with_arena(transport, self._take, blocks, targets)

    async def take_from_peer(
        self,
        peer: PeerPool,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> list[bool]:
        """Copies each block from its page of the peer, from its first layer on, to own pages. Which
        of them are whole. Raises `OSError` if the peer cannot be read.
        """
        return await self._copier.run(self._take_from_peer, peer, blocks, targets, first_layers)

    async def copy_ahead(
        self,
        peer: PeerPool,
        blocks: Sequence[PartialBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> None:
        """Copies what there is of each block, from its first layer on, and checks nothing. Raises
        `OSError` if the peer cannot be read.
        """
        places = [block.pool_page for block in blocks]
        runs = _runs(places, targets, first_layers, [block.num_layers for block in blocks])
        if runs:
            await self._copier.run(self.pages.copy_from_peer, peer, runs)

    async def seal(self, blocks: Sequence[tuple[bytes, int, int]]) -> list[bytes]:
        """The digests of (key, num_tokens, page) blocks by what is in their pages."""
        pages = [page for _, _, page in blocks]
        digests = await self._copier.run(self.pages.digest_pages, pages)
        return [
            self._sealed(key, num_tokens, digest)
            for (key, num_tokens, _), digest in zip(blocks, digests, strict=True)
        ]

    async def _with_arena(
        self,
        transport: Transport,
        work: Callable[Concatenate[HostPool, _P], _R],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _R | None:
        """What `work` makes of the arena; None if the device does not reach it, or failed to."""
        arena = self._arenas.of(transport)
        if arena is None:
            return None
        try:
            return await self._copier.run(work, arena, *args, **kwargs)
        except OSError as error:
            self._arenas.failed(transport, error)
            return None

    # -- in a thread of the copier -------------------------------------------------------------

    def whole(
        self,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        digests: Sequence[bytes] | None = None,
    ) -> list[bool]:
        """Which blocks are whole in all of their own pages; these have the digests, if given."""
        if digests is None:
            digests = self.pages.digest_pages([page for own in targets for page in own])
        copied = [block for block, own in zip(blocks, targets, strict=True) for _ in own]
        whole = {block.key: True for block in blocks}
        for block, digest in zip(copied, digests, strict=True):
            whole[block.key] &= self._sealed(block.key, block.num_tokens, digest) == block.digest
        return [whole[block.key] for block in blocks]

    def _put(self, arena: HostPool, parts: Sequence[PagePart], begin_by_s: float) -> int:
        written = 0
        for (first, end), together in groupby(parts, lambda part: part.layers):
            members = list(together)
            offsets = [part.reservation.arena_offset for part in members]
            pages = [part.page for part in members]
            if not self.pages.copy_to_host(arena, pages, first, end, offsets, begin_by_s):
                break
            written += len(members)
        return written

    def _take(
        self,
        arena: HostPool,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
    ) -> list[bool]:
        own = [page for pages in targets for page in pages]
        offsets = [b.arena_offset for b, pages in zip(blocks, targets, strict=True) for _ in pages]
        return self.whole(blocks, targets, self.pages.copy_from_host(arena, offsets, own))

    def _take_from_peer(
        self,
        peer: PeerPool,
        blocks: Sequence[ReadableBlock],
        targets: Sequence[Sequence[int]],
        first_layers: Sequence[int],
    ) -> list[bool]:
        places = [block.pool_page for block in blocks]
        runs = _runs(places, targets, first_layers, [self._num_layers] * len(blocks))
        own = [page for pages in targets for page in pages]
        return self.whole(blocks, targets, self.pages.copy_from_peer(peer, runs, own))

    def _sealed(self, key: bytes, num_tokens: int, page_digest: bytes) -> bytes:
        layout = self._layout
        return sealed_digest(key, num_tokens, layout.fingerprint, layout.block_bytes, page_digest)


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
