"""What one request's choices still lack of their blocks, and which of them read together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from splitserve.engine.sequence import PageLoad
from splitserve.kv.layout import PartialBlock, PoolPage


@dataclass(eq=False)
class Load:
    """One choice's pages: `filled` of `blocks` from the first are filled."""

    sequence_id: str
    blocks: list[PageLoad]
    filled: int = 0
    settled: bool = False

    def wants(self, block_index: int) -> PageLoad | None:
        """The page that the block goes to, if this load lacks it."""
        if self.settled or self.filled == len(self.blocks):
            return None
        position = block_index - self.blocks[0].index
        return self.blocks[position] if self.filled <= position < len(self.blocks) else None


@dataclass(frozen=True)
class Ahead:
    """What of a block was copied before it was committed."""

    place: PoolPage
    num_layers: int
    targets: list[int]


@dataclass(eq=False)
class LoadGroup:
    """Loads that share their reads. Open to more until its first block has come. `partial` has news
    of blocks that are being computed, `ahead` what was copied of them.
    """

    loads: list[Load]
    partial: list[PartialBlock] = field(default_factory=list)
    ahead: dict[bytes, Ahead] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    joinable: bool = True
    inserting: bool = False

    @property
    def idle(self) -> bool:
        """Whether no load needs a block any more."""
        return all(load.settled for load in self.loads)

    def targets(self, block_index: int) -> list[int]:
        """The pages that the block goes to."""
        pages = (load.wants(block_index) for load in self.loads)
        return [page.page for page in pages if page is not None]

    def joins(self, load: Load) -> bool:
        """Whether the group reads every block that `load` needs and has read none yet."""
        keys = {block.key for block in self.loads[0].blocks}
        return self.joinable and all(block.key in keys for block in load.blocks)


def layers_at(ahead: Ahead | None, place: PoolPage | None, targets: list[int]) -> int:
    """How many layers of the block at `place` are in its target pages."""
    if ahead is None or ahead.place != place or ahead.targets != targets:
        return 0
    return ahead.num_layers
