"""Canonical pages of a group: rank 0 puts them together from, and spreads them over, all ranks.

Exports and inserts run beside steps, in other threads, so they have a connection of their own.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Mapping
from typing import Protocol

from splitserve.parallel.ending import Ending
from splitserve.parallel.link import MAX_MESSAGE_BYTES, Kind, Link, LinkClosed
from splitserve.parallel.page_slices import PageSlices

_EXPORT = struct.Struct("<IIIQ")
_INSERT = struct.Struct("<I")


class RankPages(Protocol):
    """One rank's own pages, of its own heads; see `Engine` for the methods."""

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """Copy layers of a page into `out`."""
        ...

    def insert_page(self, page: int, content: memoryview) -> None:
        """Overwrite a page."""
        ...


class GroupPages:
    """Rank 0's side. One copy at a time.

    Rank 0's own part comes first. What is wrong with a call is found before a follower hears of
    it, so that requests and answers stay in step. And on GPUs a copy out of rank 0's memory waits
    for the kernels before it, among them a sum that the others gave after they had stored what
    they will be asked for: rank 0's host alone may be ahead of theirs.
    """

    def __init__(
        self,
        own: RankPages,
        followers: Mapping[int, Link],
        slices: PageSlices,
        ending: Ending,
    ) -> None:
        self._own = own
        self._followers = dict(followers)
        self._slices = slices
        self._part = bytearray(slices.rank_page.page_bytes)
        self._ending = ending
        self._lock = threading.Lock()

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """See `Engine.export_page`."""
        size = (end_layer - first_layer) * self._slices.rank_layer_bytes
        asked = [rank for rank in self._slices.owners if rank]
        with self._lock:
            part = memoryview(self._part)[:size]
            self._own.export_page(page, first_layer, end_layer, part)
            self._slices.gather(0, part, out)
            try:
                for rank in asked:
                    request = _EXPORT.pack(page, first_layer, end_layer, size)
                    self._followers[rank].send(Kind.EXPORT, request)
                for rank in asked:
                    _receive_part(self._followers[rank], part)
                    self._slices.gather(rank, part, out)
            except LinkClosed as error:
                self._ending.lost("reading KV from the other ranks", error)

    def insert_page(self, page: int, content: memoryview) -> None:
        """See `Engine.insert_page`. Every rank has its part when this returns."""
        with self._lock:
            part = memoryview(self._part)
            self._slices.scatter(0, content, part)
            self._own.insert_page(page, part)
            try:
                for rank, link in self._followers.items():
                    self._slices.scatter(rank, content, part)
                    link.send(Kind.INSERT, _INSERT.pack(page) + part)
                for link in self._followers.values():
                    _receive_part(link, memoryview(b""))
            except LinkClosed as error:
                self._ending.lost("giving KV to the other ranks", error)


def serve_pages(link: Link, own: RankPages) -> None:
    """A follower's side: answer until the link closes, which raises `LinkClosed`."""
    while True:
        kind, payload = link.receive()
        if kind is Kind.EXPORT and len(payload) == _EXPORT.size:
            page, first, end, size = _EXPORT.unpack(payload)
            if size > MAX_MESSAGE_BYTES:
                raise LinkClosed(f"a page of {size} bytes")
            part = bytearray(size)
            own.export_page(page, first, end, memoryview(part))
            link.send(Kind.DONE, part)
        elif kind is Kind.INSERT and len(payload) > _INSERT.size:
            (page,) = _INSERT.unpack_from(payload)
            own.insert_page(page, memoryview(payload)[_INSERT.size :])
            link.send(Kind.DONE)
        else:
            raise LinkClosed(f"{kind.name} of {len(payload)} bytes where a page was expected")


def _receive_part(link: Link, part: memoryview) -> None:
    kind, size = link.receive_header()
    if kind is not Kind.DONE or size != len(part):
        raise LinkClosed(f"{kind.name} of {size} bytes where {len(part)} of a page were expected")
    link.receive_into(part)
