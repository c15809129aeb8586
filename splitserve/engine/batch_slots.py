"""Who sits where in a batch: a step computes a row for each slot up to the last that is taken."""

from __future__ import annotations

import heapq

from splitserve.engine.sequence import Sequence


class BatchSlots:
    """Slots [0, count), given to sequences as their `slot`."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))

    def take(self, sequence: Sequence) -> None:
        """Give it the lowest that is free; there must be one."""
        sequence.slot = heapq.heappop(self._free)

    def leave(self, sequence: Sequence) -> None:
        """It has left the batch."""
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = sequence.came_from = -1

    def close_ranks(self, running: list[Sequence]) -> None:
        """Have the last ones of the batch, all of whom are `running`, take the slots below them
        that have been given up.
        """
        if not self._free or self._free[0] >= len(running):
            return
        for sequence in sorted(running, key=lambda each: each.slot, reverse=True):
            if sequence.slot < len(running):
                return
            if sequence.came_from < 0:
                sequence.came_from = sequence.slot
            sequence.slot = heapq.heapreplace(self._free, sequence.slot)
