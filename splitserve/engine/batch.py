"""One step's slices as the tensors that a forward pass reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import Slice


@dataclass(frozen=True)
class QueryGroup:
    """Queries that attend together: every sequence in it has `count` new tokens.

    Rows [first_row, first_row + sequences * count) of the batch, sequence by sequence.
    """

    first_row: int
    count: int
    page_table: Tensor
    """(sequences, pages) int64, padded with page 0."""
    lengths: Tensor
    """(sequences,) int64: tokens to attend to, the new ones included."""
    longest: int
    shortest: int

    @property
    def sequences(self) -> int:
        """How many sequences."""
        return int(self.page_table.shape[0])


@dataclass(frozen=True)
class StepBatch:
    """Rows of all slices, decoding ones first."""

    token_ids: Tensor
    """(rows,) int64."""
    positions: Tensor
    """(rows,) int64."""
    kv_rows: Tensor
    """(rows,) int64: where each row's key goes, see `PageMemory.token_rows`."""
    groups: list[QueryGroup]
    last_rows: Tensor
    """(draws,) int64: the row of each draw, slice by slice in the order given."""


def build_batch(slices: Sequence[Slice], memory: PageMemory, device: torch.device) -> StepBatch:
    """Lay out a step. Slices of one token form one group; each longer one is its own."""
    block = memory.block_tokens
    single = [s for s in slices if len(s.token_ids) == 1]
    longer = [s for s in slices if len(s.token_ids) > 1]
    token_ids: list[int] = []
    positions: list[int] = []
    pages: list[int] = []
    last_row: dict[int, int] = {}
    for part in single + longer:
        token_ids += part.token_ids
        span = range(part.start, part.start + len(part.token_ids))
        positions += span
        pages += [part.pages[position // block] for position in span]
        last_row[id(part)] = len(token_ids) - 1

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    place = tensor(positions)
    groups = [_group(single, 0, block, tensor)] if single else []
    row = len(single)
    for part in longer:
        groups.append(_group([part], row, block, tensor))
        row += len(part.token_ids)
    return StepBatch(
        token_ids=tensor(token_ids),
        positions=place,
        kv_rows=memory.token_rows(tensor(pages), place % block),
        groups=groups,
        last_rows=tensor([last_row[id(s)] for s in slices for _ in s.draws]),
    )


def _group(
    slices: list[Slice], first_row: int, block: int, tensor: Callable[..., Tensor]
) -> QueryGroup:
    lengths = [s.start + len(s.token_ids) for s in slices]
    width = -(-max(lengths) // block)
    table = [(list(s.pages[:width]) + [0] * width)[:width] for s in slices]
    return QueryGroup(
        first_row=first_row,
        count=len(slices[0].token_ids),
        page_table=tensor(table),
        lengths=tensor(lengths),
        longest=max(lengths),
        shortest=min(lengths),
    )
