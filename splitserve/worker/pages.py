"""An engine's pool as hand-overs see it: whatever the engine can do at once, else page by page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from splitserve.engine.protocol import Engine
from splitserve.kv.pages import SharesPages


@runtime_checkable
class MovesPages(Protocol):
    """A pool of which many pages are copied at once; see `PageAccess`."""

    def export_pages(
        self, pages: Sequence[int], first_layer: int, end_layer: int, outs: Sequence[memoryview]
    ) -> None:
        """Copy layers of pages to host memory."""

    def insert_pages(self, pages: Sequence[int], contents: Sequence[memoryview]) -> None:
        """Overwrite pages from host memory."""

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Let the device copy to and from host memory by itself."""


@runtime_checkable
class HasDevicePages(Protocol):
    """An engine whose pool is on a device that copies and digests pages: `MovesPages` and
    `SharesPages`.
    """

    @property
    def device_pages(self) -> object:
        """The pool as hand-overs see it."""


class EnginePages:
    """Implements `PageAccess`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        pool = engine.device_pages if isinstance(engine, HasDevicePages) else engine
        self._moves = pool if isinstance(pool, MovesPages) else None
        whole_words = engine.spec.block_bytes % 8 == 0
        self.shared = pool if whole_words and isinstance(pool, SharesPages) else None
        self.layer_bytes = engine.spec.layer_bytes

    def export_pages(
        self, pages: Sequence[int], first_layer: int, end_layer: int, outs: Sequence[memoryview]
    ) -> None:
        """See `PageAccess.export_pages`."""
        if self._moves is not None:
            self._moves.export_pages(pages, first_layer, end_layer, outs)
            return
        for page, out in zip(pages, outs, strict=True):
            self._engine.export_page(page, first_layer, end_layer, out)

    def insert_pages(self, pages: Sequence[int], contents: Sequence[memoryview]) -> None:
        """See `PageAccess.insert_pages`."""
        if self._moves is not None:
            self._moves.insert_pages(pages, contents)
            return
        for page, content in zip(pages, contents, strict=True):
            self._engine.insert_page(page, content)

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """See `PageAccess.pin`."""
        return self._moves.pin(memory) if self._moves is not None else _nothing


def _nothing() -> None:
    """Nothing was pinned."""
