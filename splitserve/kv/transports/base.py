"""What the store client needs of a way to move bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from splitserve.errors import LeaseEnded
from splitserve.kv.layout import Lease, ReadableBlock, Reservation


class WriteTooLate(LeaseEnded):
    """A copy waited for its turn until its lease was not vouched for any more; it has not begun."""


class Transport(Protocol):
    """Moves the bytes of blocks to and from one run of one store."""

    @property
    def name(self) -> str:
        """As in the logs and metrics: `shm` or `grpc`."""

    @property
    def needs_vouching(self) -> bool:
        """Whether `write` reaches the arena without the store's looking at the lease."""

    async def write(
        self,
        lease: Lease,
        key: bytes,
        reservation: Reservation,
        offset_bytes: int,
        data: memoryview,
        begin_by_s: float,
    ) -> None:
        """Copies `data` (contiguous bytes) to `offset_bytes` of a reserved block.

        A transport that needs vouching raises WriteTooLate, and touches nothing, if the copy's
        turn comes only after `begin_by_s`, in the seconds of `time.monotonic`.
        """

    async def read(
        self, lease: Lease, block: ReadableBlock, out: memoryview, check: Callable[[], None]
    ) -> None:
        """Copies a block to `out`, contiguous bytes of exactly its size, then runs `check`.

        `check` verifies the copy and runs off the event loop; what it raises is raised.
        """

    def close(self) -> None:
        """Gives up what it holds once copies in flight are done."""
