"""One block of the store, and what becomes of a wish to write one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from services.kvstore.space import Extent
from splitserve.kv.layout import PartialBlock


class ReserveOutcome(Enum):
    """What became of one block of a reservation."""

    WRITE = "write"
    PRESENT = "present"
    BEING_WRITTEN = "being written"


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """Where in a worker's pool a block is. `lease_id` is the one that it was reserved under."""

    pool_id: int
    page: int
    share_id: int
    lease_id: str


@dataclass(slots=True)
class Block:
    """One block. `writer` is set while it is reserved, `digest` once it is committed.

    Its bytes are in the arena if it has an extent, else in a pool: at `pool`, once committed, and
    as far as `partial` says before. `read_early` are leases that need it no more, though it is yet
    to be committed in its pool.
    """

    key: bytes
    extent: Extent | None
    size_bytes: int
    num_tokens: int
    may_rest: bool
    writer: str | None
    digest: bytes = b""
    holders: set[str] = field(default_factory=set)
    pool: PoolPlace | None = None
    partial: PartialBlock | None = None
    read_early: frozenset[str] = frozenset()

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena that it takes."""
        return self.extent.size_bytes if self.extent else 0

    @property
    def committed(self) -> bool:
        """Whether readers may see it."""
        return self.writer is None


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer for one block: what to do, and where it is."""

    outcome: ReserveOutcome
    block: Block
