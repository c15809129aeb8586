"""The pages of one engine's KV pool: who holds them, and which hold a reusable prefix.

A page is in exactly one of three places:

    blank    nobody holds it and its content means nothing
    held     reference count > 0; if it has a key its content is immutable
    idle     nobody holds it, but it has a key and may be held again; evicted oldest first

so blank + held + idle = num_pages at all times (`check`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


class PoolFull(Exception):
    """Fewer pages are free than were asked for. Nothing was allocated."""


class PagePool:
    """Allocates pages by number and finds them again by key. Not thread-safe."""

    def __init__(self, num_pages: int, *, reuse: bool = True) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self._reuse = reuse
        self._blank: deque[int] = deque(range(num_pages))
        self._refs = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._added: list[bytes] = []
        self._removed: list[bytes] = []

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give now."""
        return len(self._blank) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages of undefined content, evicting the oldest idle ones if needed."""
        if count > self.num_free:
            raise PoolFull
        pages = []
        for _ in range(count):
            page = self._blank.popleft() if self._blank else self._evict()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the pages of the longest cached prefix of `keys`."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._refs[page] == 0:
                del self._idle[page]
            self._refs[page] += 1
            pages.append(page)
        return pages

    def register(self, page: int, key: bytes) -> None:
        """Declare a held page complete under `key`. If another page has the key, that one stays."""
        if not self._reuse or key in self._page_of or page in self._key_of:
            return
        if self._refs[page] == 0:
            raise ValueError(f"page {page} is not held")
        self._key_of[page] = key
        self._page_of[key] = page
        self._added.append(key)

    def free(self, pages: Sequence[int]) -> None:
        """Let go of pages. The last of a sequence is the first to be evicted: it is no use
        without the ones before it.
        """
        for page in reversed(pages):
            if self._refs[page] == 0:
                raise ValueError(f"page {page} is freed twice")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Keys that were added and removed since the last call."""
        changes = self._added, self._removed
        self._added, self._removed = [], []
        return changes

    def check(self) -> None:
        """Raise `AssertionError` unless every page is in exactly one place."""
        held = {page for page, refs in enumerate(self._refs) if refs}
        places = [set(self._blank), held, set(self._idle)]
        assert sum(map(len, places)) == self.num_pages == len(set.union(*places))
        assert set(self._page_of.values()) == set(self._key_of)
        assert set(self._idle) <= set(self._key_of)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        key = self._key_of.pop(page)
        del self._page_of[key]
        self._removed.append(key)
        return page
