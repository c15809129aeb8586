"""A part of a page on its way to the store."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.kv.codec import BlockHasher
from splitserve.kv.layout import Reservation


@dataclass(frozen=True)
class PagePart:
    """Layers [first_layer, end_layer) of a page, to be written to a reserved block. `hasher` has
    taken in the layers before, and takes in these; there is none where a device digests pages.
    """

    key: bytes
    reservation: Reservation
    page: int
    first_layer: int
    end_layer: int
    hasher: BlockHasher | None

    @property
    def layers(self) -> tuple[int, int]:
        """First and end."""
        return self.first_layer, self.end_layer
