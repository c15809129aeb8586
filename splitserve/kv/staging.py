"""Host memory of this process alone, through which blocks pass between pages and an arena.

Others write to the arena. What is digested and used is therefore always a copy that nobody else can
change in between. Buffers are small and used again, so that they stay in a core's cache.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from splitserve.kv.pages import PageAccess

_log = logging.getLogger(__name__)


class Staging:
    """Buffers of one worker's copies: as many as are lent at once, for as long as it lives."""

    def __init__(self, pages: PageAccess, buffer_bytes: int) -> None:
        self._pages = pages
        self._buffer_bytes = buffer_bytes
        self._free: list[memoryview] = []
        self._pinned: list[tuple[memoryview, Callable[[], None]]] = []

    @contextmanager
    def lent(self) -> Iterator[memoryview]:
        """A buffer with any content. May be called from several threads at a time."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = self._make()
        try:
            yield buffer
        finally:
            self._free.append(buffer)

    def close(self) -> None:
        """Unpins all buffers, which may take a while. None may be lent."""
        self._free.clear()
        while self._pinned:
            # The buffer is not unmapped before `unpin` has ended.
            buffer, unpin = self._pinned.pop()
            unpin()
            del buffer

    def _make(self) -> memoryview:
        # Whole pages of its own, for these are what is pinned.
        buffer = np.frombuffer(mmap.mmap(-1, self._buffer_bytes), dtype=np.uint8).data
        try:
            self._pinned.append((buffer, self._pages.pin(buffer)))
        except Exception:
            _log.exception("host memory could not be pinned, copies take a detour")
        return buffer
