"""One block of the store, and what becomes of a wish to write one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from services.kvstore.space import Extent


class ReserveOutcome(Enum):
    """What became of one block of a reservation."""

    WRITE = "write"
    PRESENT = "present"
    BEING_WRITTEN = "being written"


@dataclass(slots=True)
class Block:
    """One block. `writer` is set while it is reserved, `digest` once it is committed."""

    key: bytes
    extent: Extent
    size_bytes: int
    num_tokens: int
    may_rest: bool
    writer: str | None
    digest: bytes = b""
    holders: set[str] = field(default_factory=set)

    @property
    def committed(self) -> bool:
        """Whether readers may see it."""
        return self.writer is None


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer for one block: what to do, and where in the arena it is."""

    outcome: ReserveOutcome
    block: Block
