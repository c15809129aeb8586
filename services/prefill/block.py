"""One block of a prompt on its way to whoever decodes it."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.kv.codec import BlockHasher
from splitserve.kv.layout import Reservation
from splitserve.kv.page_part import PagePart


@dataclass(eq=False)
class Block:
    """0 <= written <= ready <= layers of the block. `reservation` is set until it is committed."""

    key: bytes
    index: int
    page: int
    num_tokens: int
    ready: int = 0
    written: int = 0
    reservation: Reservation | None = None
    hasher: BlockHasher | None = None

    @property
    def stays(self) -> bool:
        """Whether it is to be committed where it is in the pool."""
        return self.reservation is not None and self.reservation.in_pool

    def next_part(self) -> PagePart:
        """The layers that are ready and not written yet."""
        if self.reservation is None:
            raise RuntimeError("a block is written that was not reserved")
        return PagePart(
            self.key, self.reservation, self.page, self.written, self.ready, self.hasher
        )

    def settle(self) -> None:
        """It is committed, or others see to it."""
        self.reservation = self.hasher = None
