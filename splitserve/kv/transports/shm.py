"""Shared memory: the store's arena, mapped into this process."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from splitserve.errors import BlockOutOfRange, Unavailable
from splitserve.kv.copier import Copier
from splitserve.kv.layout import Lease, ReadableBlock, Reservation
from splitserve.kv.transports.base import WriteTooLate
from splitserve.kv.transports.handle import Handle, receive_handle


class ShmTransport:
    """Copies straight into and out of the arena, in the copier's threads.

    The mapping stays good after the store is gone: the kernel keeps the memory until the last
    mapping ends. It belongs to one run of the store; after a restart a new one is made.
    """

    name = "shm"
    needs_vouching = True

    def __init__(self, handle: Handle, copier: Copier) -> None:
        """Maps the arena; takes over and closes `handle.fd`."""
        try:
            mapping = mmap.mmap(handle.fd, handle.arena_bytes)
        finally:
            os.close(handle.fd)
        # The array keeps the mapping alive for as long as any copy uses it.
        self._arena: NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)
        self._copier = copier
        self._closed = False
        self._when_closed: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, handle_socket: str, *, epoch: int, copier: Copier) -> ShmTransport:
        """Reaches the store's handle socket. Raises OSError if that is not possible from here."""

        def reach() -> ShmTransport:
            handle = receive_handle(handle_socket)
            if handle.epoch != epoch:
                os.close(handle.fd)
                raise ConnectionError("the handle socket belongs to another run of the store")
            return cls(handle, copier)

        # In one go, so that a caller who is cancelled leaves no descriptor open.
        return await copier.run(reach)

    @property
    def arena(self) -> memoryview:
        """The whole arena."""
        return self._arena.data

    def span(self, offset: int, size_bytes: int) -> memoryview:
        """A part of the arena, good for as long as it is used, closed or not. Raises Unavailable
        once closed, BlockOutOfRange.
        """
        return self._span(offset, size_bytes).data

    async def write(
        self,
        lease: Lease,
        key: bytes,
        reservation: Reservation,
        offset_bytes: int,
        data: memoryview,
        begin_by_s: float,
    ) -> None:
        """See Transport."""
        target = self._span(reservation.arena_offset + offset_bytes, data.nbytes)
        source = np.frombuffer(data, dtype=np.uint8)
        await self._copier.run(_copy_in_time, target, source, begin_by_s)

    async def read(
        self, lease: Lease, block: ReadableBlock, out: memoryview, check: Callable[[], None]
    ) -> None:
        """See Transport."""
        source = self._span(block.arena_offset, block.size_bytes)
        await self._copier.run(_copy_and_check, np.frombuffer(out, dtype=np.uint8), source, check)

    def close(self) -> None:
        """See Transport. The kernel unmaps when the last copy in flight lets go."""
        self._closed = True
        self._arena = np.empty(0, dtype=np.uint8)
        while self._when_closed:
            self._when_closed.pop()()

    def when_closed(self, let_go: Callable[[], None]) -> None:
        """Have `let_go` called by `close`: it gives up what else keeps the arena."""
        self._when_closed.append(let_go)

    def _span(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        if self._closed:
            raise Unavailable("the store's memory was given up")
        if offset < 0 or offset + size_bytes > self._arena.size:
            raise BlockOutOfRange(f"[{offset}, {offset + size_bytes}) is outside of the arena")
        return self._arena[offset : offset + size_bytes]


def _copy_in_time(target: NDArray[np.uint8], source: NDArray[np.uint8], begin_by_s: float) -> None:
    # Looked at here, in the thread, for the copy may have waited long behind others.
    if time.monotonic() >= begin_by_s:
        raise WriteTooLate("the copy's turn came too late for what the store had vouched for")
    np.copyto(target, source)


def _copy_and_check(
    target: NDArray[np.uint8], source: NDArray[np.uint8], check: Callable[[], None]
) -> None:
    # In the same thread, so that the check finds the copy in the core's cache.
    np.copyto(target, source)
    check()
