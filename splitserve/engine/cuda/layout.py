"""How a step's numbers lie in one array, so that they reach the device in one copy.

A step has a row for each slot of the batch, whether or not its sequence is in the step, and after
these the rows of its chunks of prompts. So a decoding sequence's row is its slot in every step,
and one moves at most when a neighbour ends. Never imports torch: this is the host's part of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from splitserve.engine.protocol import Slice

Numbers = NDArray[np.int64]

NOBODY = -1
"""The position of a row that belongs to no sequence in this step."""


@dataclass(frozen=True)
class StepShape:
    """`slots` rows that decode, `rows` rows of `chunks` chunks. What a CUDA graph is made for."""

    slots: int
    rows: int = 0
    chunks: int = 0

    @property
    def total_rows(self) -> int:
        """Rows of both kinds."""
        return self.slots + self.rows

    @cached_property
    def sections(self) -> tuple[slice, ...]:
        """Where `lay_out` puts token ids and positions of all rows, slots of chunk rows; then of
        chunks: row starts (one more), lengths, slots. Each begins at a multiple of 16 bytes, as
        kernels are compiled once for that and once for all else.
        """
        total, rows, chunks = self.total_rows, self.rows, self.chunks
        sections, first = list[slice](), 0
        for length in (total, total, rows, chunks + 1, chunks, chunks):
            sections.append(slice(first, first + length))
            first += length + length % 2
        return tuple(sections)

    @cached_property
    def size(self) -> int:
        """Numbers in all, an even number: what is behind them begins as each section does."""
        end: int = self.sections[-1].stop
        return end + end % 2

    def telling(self) -> StepShape:
        """The least that holds this one and a chunk: only with chunks are graphs made in parts."""
        return replace(self, rows=max(1, self.rows), chunks=max(1, self.chunks))

    def holds(self, other: StepShape) -> bool:
        """Whether a step of the other shape can be padded to this one."""
        return self.slots >= other.slots and self.rows >= other.rows and self.chunks >= other.chunks


@dataclass(frozen=True)
class StepPlan:
    """The slices of a step by what becomes of them."""

    decoding: list[Slice]
    """One new token each, in a slot's own row."""
    chunks: list[Slice]

    @classmethod
    def of(cls, slices: Sequence[Slice]) -> StepPlan:
        """A single token without a draw, or with several, is a chunk like any other."""
        plan = cls([], [])
        for part in slices:
            alone = len(part.token_ids) == 1 and len(part.draws) == 1
            (plan.decoding if alone else plan.chunks).append(part)
        return plan

    @property
    def shape(self) -> StepShape:
        """The least that holds it."""
        slots = max((part.slot for part in self.decoding), default=-1) + 1
        rows = sum(len(part.token_ids) for part in self.chunks)
        return StepShape(slots, rows, len(self.chunks))

    def logit_rows(self, shape: StepShape) -> dict[int, int]:
        """Which row of the step's logits each slot draws from."""
        rows = {part.slot: part.slot for part in self.decoding}
        rows.update((part.slot, shape.slots + i) for i, part in enumerate(self.chunks))
        return rows

    def lay_out(self, shape: StepShape, out: Numbers, *, nobody: int) -> None:
        """Fill `out`, (shape.size,), for a shape that holds this step's.

        Rows of nobody have the position `NOBODY`; chunks that are only padding are empty ones of
        the slot `nobody`.
        """
        parts = (out[section] for section in shape.sections)
        tokens, positions, row_slots, starts, lengths, slots = parts
        tokens[:] = 0
        positions[:] = NOBODY
        for part in self.decoding:
            tokens[part.slot] = part.token_ids[0]
            positions[part.slot] = part.start
        row_slots[:] = nobody
        lengths[:] = 0
        slots[:] = nobody
        row = 0
        for index, part in enumerate(self.chunks):
            end = row + len(part.token_ids)
            own = slice(shape.slots + row, shape.slots + end)
            tokens[own] = part.token_ids
            positions[own] = np.arange(part.start, part.start + end - row)
            row_slots[row:end] = part.slot
            starts[index] = shape.slots + row
            lengths[index] = part.start + end - row
            slots[index] = part.slot
            row = end
        starts[len(self.chunks) :] = shape.slots + row


def placed_by_order(slices: Sequence[Slice]) -> list[Slice]:
    """Slices of a step that stands alone: slots are their places in it."""
    return [part._replace(slot=index, came_from=-1) for index, part in enumerate(slices)]
