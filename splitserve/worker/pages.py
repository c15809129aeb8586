"""An engine's pool as hand-overs see it: whatever the engine can do at once, else page by page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from splitserve.engine.protocol import Engine
from splitserve.kv.pages import SharesPages


@runtime_checkable
class MovesPages(Protocol):
    """An engine that copies many pages at once; see `PageAccess`."""

    def export_pages(
        self, pages: Sequence[int], first_layer: int, end_layer: int, outs: Sequence[memoryview]
    ) -> None:
        """Copy layers of pages to host memory."""

    def insert_pages(self, pages: Sequence[int], contents: Sequence[memoryview]) -> None:
        """Overwrite pages from host memory."""

    def pin(self, memory: memoryview) -> Callable[[], None]:
        """Let the device copy to and from host memory by itself."""


class EnginePages:
    """Implements `PageAccess`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._moves = engine if isinstance(engine, MovesPages) else None
        whole_words = engine.spec.block_bytes % 8 == 0
        self.shared = engine if whole_words and isinstance(engine, SharesPages) else None
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
