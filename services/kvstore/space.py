"""Which bytes of the arena are free.

The free bytes are kept as maximal extents: two free extents never touch, because every release
joins its neighbours. Allocation is best fit, lowest address first among equals, so that the large
extents stay large while blocks of several sizes come and go.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes: [offset, offset + size_bytes), both multiples of the page."""

    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.size_bytes


def round_up(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class Space:
    """Allocates extents of one arena. Not thread-safe; the store has one event loop."""

    def __init__(self, arena_bytes: int) -> None:
        if arena_bytes < PAGE_BYTES or arena_bytes % PAGE_BYTES:
            raise ValueError(f"arena_bytes must be a positive multiple of {PAGE_BYTES}")
        self.arena_bytes = arena_bytes
        self.free_bytes = 0
        # The same free extents three times: by start, by end, and ordered by (size, start).
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._insert(0, arena_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes not free."""
        return self.arena_bytes - self.free_bytes

    def allocate(self, size_bytes: int) -> Extent | None:
        """An extent of at least `size_bytes` (> 0), or None if no free extent is large enough."""
        need = round_up(size_bytes)
        if need <= 0:
            raise ValueError("size_bytes must be positive")
        at = bisect_left(self._by_size, (need, -1))
        if at == len(self._by_size):
            return None
        size, start = self._by_size[at]
        self._remove(start, size)
        if size > need:
            self._insert(start + need, size - need)
        return Extent(start, need)

    def release(self, extent: Extent) -> None:
        """Takes an extent back. It must come from `allocate` and be released once."""
        start, end = extent.offset, extent.end
        before = self._start_before.get(start)
        if before is not None:
            self._remove(before, start - before)
            start = before
        after = self._size_at.get(end)
        if after is not None:
            self._remove(end, after)
            end += after
        self._insert(start, end - start)

    def free_extents(self) -> list[Extent]:
        """All free extents by address, for checks."""
        return [Extent(start, size) for start, size in sorted(self._size_at.items())]

    def _insert(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_before[start + size] = start
        insort(self._by_size, (size, start))
        self.free_bytes += size

    def _remove(self, start: int, size: int) -> None:
        del self._size_at[start]
        del self._start_before[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        self.free_bytes -= size
