"""Who has which blocks. Soft state: an answer may be stale, and losing it costs cache misses.

`Directory` is what the service needs of one; `MemoryDirectory` keeps everything in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

_log = logging.getLogger(__name__)


class Directory(Protocol):
    """Holders' blocks. A holder is one publisher, a worker's pool or a store.

    `open` returns a token; a later `open` of the same holder starts it empty and voids the earlier
    token, so that the late end of a broken stream does not wipe out its successor's entries.
    """

    async def start(self) -> None:
        """Begins whatever runs in the background."""

    async def stop(self) -> None:
        """Ends it and gives up what this process published."""

    def open(self, holder_id: str) -> object:
        """Begins to take in a holder's blocks."""

    def update(self, token: object, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Changes what the holder has; nothing if the token is void.

        A full directory leaves out what it has no room for: that costs cache misses, no more.
        """

    def close(self, token: object) -> None:
        """Forgets the holder; nothing if the token is void."""

    async def lookup(self, keys: Sequence[bytes]) -> dict[str, int]:
        """For each holder of the first key, how many of the chain it has without a gap."""

    @property
    def num_entries(self) -> int:
        """(holder, block) pairs that this process was told of."""


class Holder:
    """One publisher's blocks; also the token of its stream."""

    def __init__(self, holder_id: str) -> None:
        self.holder_id = holder_id
        self.keys: set[bytes] = set()


class MemoryDirectory:
    """The embedded directory, with an index from key to holders."""

    def __init__(self, *, max_entries: int) -> None:
        self._max_entries = max_entries
        self._holders: dict[str, Holder] = {}
        self._by_key: dict[bytes, set[str]] = {}
        self._num_entries = 0
        self.num_left_out = 0

    @property
    def num_entries(self) -> int:
        """See Directory."""
        return self._num_entries

    @property
    def holders(self) -> list[Holder]:
        """Every holder that is open."""
        return list(self._holders.values())

    async def start(self) -> None:
        """See Directory."""

    async def stop(self) -> None:
        """See Directory."""

    def open(self, holder_id: str) -> Holder:
        """See Directory."""
        earlier = self._holders.get(holder_id)
        if earlier is not None:
            self.close(earlier)
        holder = self._holders[holder_id] = Holder(holder_id)
        return holder

    def is_open(self, token: object) -> bool:
        """Whether the token is the holder's latest."""
        return isinstance(token, Holder) and self._holders.get(token.holder_id) is token

    def update(self, token: object, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """See Directory."""
        if not isinstance(token, Holder) or not self.is_open(token):
            return
        for key in removed:
            self._remove(token, key)
        for key in added:
            if key in token.keys:
                continue
            if self._num_entries >= self._max_entries:
                self._leave_out()
                continue
            token.keys.add(key)
            self._by_key.setdefault(key, set()).add(token.holder_id)
            self._num_entries += 1

    def close(self, token: object) -> None:
        """See Directory."""
        if not isinstance(token, Holder) or not self.is_open(token):
            return
        for key in list(token.keys):
            self._remove(token, key)
        del self._holders[token.holder_id]

    async def lookup(self, keys: Sequence[bytes]) -> dict[str, int]:
        """See Directory."""
        lengths: dict[str, int] = {}
        alive: set[str] = set()
        for count, key in enumerate(keys):
            have = self._by_key.get(key, set())
            alive = set(have) if count == 0 else alive & have
            if not alive:
                break
            lengths.update(dict.fromkeys(alive, count + 1))
        return lengths

    def _leave_out(self) -> None:
        if not self.num_left_out:
            _log.warning(
                "the directory is full with %d entries; what comes now is left out "
                "(--max-directory-entries)",
                self._max_entries,
            )
        self.num_left_out += 1

    def _remove(self, holder: Holder, key: bytes) -> None:
        if key not in holder.keys:
            return
        holder.keys.remove(key)
        having = self._by_key[key]
        having.remove(holder.holder_id)
        if not having:
            del self._by_key[key]
        self._num_entries -= 1
