"""Who waits for which block.

An awaiter asks for several keys under one lease and is told of each exactly once: ready, or
missing. It ends early, with LeaseEnded, when its lease does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

from services.kvstore.block import Block
from services.kvstore.pools import Reach
from splitserve.errors import LeaseEnded, Overloaded
from splitserve.kv.layout import PartialBlock

Decided = tuple[list[Block], list[bytes]]
_K = TypeVar("_K")
_NOWHERE = Reach()


class Awaiter:
    """One call that waits. Its owner iterates `batches`; the store decides keys."""

    def __init__(self, lease_id: str, keys: Iterable[bytes], reach: Reach = _NOWHERE) -> None:
        self.lease_id = lease_id
        self.reach = reach
        self.pending = set(keys)
        self._ready: list[Block] = []
        self._missing: list[bytes] = []
        self._partial: dict[bytes, PartialBlock] = {}
        self._lease_ended = False
        self._changed = asyncio.Event()

    def decide(self, key: bytes, block: Block | None) -> None:
        """Answers one pending key: the block, or None for missing."""
        self.pending.remove(key)
        if block is None:
            self._missing.append(key)
        else:
            self._ready.append(block)
        self._changed.set()

    def tell(self, partial: PartialBlock) -> None:
        """How far a pending block is."""
        self._partial[partial.key] = partial
        self._changed.set()

    def take_partial(self) -> list[PartialBlock]:
        """What `tell` was told since the last time, of blocks that are still pending."""
        partial, self._partial = self._partial, {}
        return [block for key, block in partial.items() if key in self.pending]

    def end(self) -> None:
        """The lease has ended: nothing more is decided."""
        self._lease_ended = True
        self._changed.set()

    async def batches(self) -> AsyncIterator[Decided]:
        """What was decided since the last time, until every key was; nothing at all, if there is
        something for `take_partial`. Raises LeaseEnded.
        """
        while True:
            if self._lease_ended:
                raise LeaseEnded("the lease ended while its blocks were awaited")
            if self._ready or self._missing or self._partial:
                decided = self._ready, self._missing
                self._ready, self._missing = [], []
                yield decided
            elif not self.pending:
                return
            else:
                self._changed.clear()
                await self._changed.wait()


class Awaiters:
    """All calls that wait, found by key and by lease. Bounded in number and in keys."""

    def __init__(self, *, max_calls: int, max_keys: int) -> None:
        self._max_calls = max_calls
        self._max_keys = max_keys
        self._calls: set[Awaiter] = set()
        self._by_key: dict[bytes, set[Awaiter]] = {}
        self._by_lease: dict[str, set[Awaiter]] = {}
        self._num_keys = 0

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, awaiter: Awaiter) -> None:
        """Registers a call with its pending keys. Raises Overloaded when there are too many."""
        keys = len(awaiter.pending)
        if len(self._calls) >= self._max_calls or self._num_keys + keys > self._max_keys:
            raise Overloaded("too many blocks are awaited", retry_after_s=0.1)
        self._calls.add(awaiter)
        self._num_keys += keys
        self._by_lease.setdefault(awaiter.lease_id, set()).add(awaiter)
        for key in awaiter.pending:
            self._by_key.setdefault(key, set()).add(awaiter)

    def remove(self, awaiter: Awaiter) -> None:
        """Forgets a call, whatever it still waits for."""
        self._calls.discard(awaiter)
        _discard(self._by_lease, awaiter.lease_id, awaiter)
        for key in awaiter.pending:
            self._forget_key(key, awaiter)

    def of(self, key: bytes) -> list[Awaiter]:
        """The calls that wait for a key."""
        return list(self._by_key.get(key, ()))

    def decide(self, awaiter: Awaiter, key: bytes, block: Block | None) -> None:
        """Answers a key of a registered call."""
        awaiter.decide(key, block)
        self._forget_key(key, awaiter)

    def end_lease(self, lease_id: str) -> None:
        """Ends every call under a lease that has ended."""
        for awaiter in list(self._by_lease.get(lease_id, ())):
            awaiter.end()
            self.remove(awaiter)

    def _forget_key(self, key: bytes, awaiter: Awaiter) -> None:
        if _discard(self._by_key, key, awaiter):
            self._num_keys -= 1


def _discard(index: dict[_K, set[Awaiter]], key: _K, awaiter: Awaiter) -> bool:
    """Takes an awaiter out of an index that keeps no empty sets. False: it was not in."""
    waiting = index.get(key)
    if waiting is None or awaiter not in waiting:
        return False
    waiting.remove(awaiter)
    if not waiting:
        del index[key]
    return True
