"""From tokens to the first hidden state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.models.layers.norm import Norm
from splitserve.models.linear import Linear
from splitserve.parallel.group import Group


@dataclass(frozen=True)
class Embedding:
    """A row of the table for each token, and what a family adds to it.

    `table` has this rank's tokens [first, first + rows). `positions` has a row for each position,
    from `offset` on.
    """

    table: Tensor
    first: int
    group: Group
    scale: float = 1.0
    norm: Norm | None = None
    projection: Linear | None = None
    positions: Tensor | None = None
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states."""
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self.table.device

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """(rows, hidden_size) for (rows,) tokens at (rows,) positions."""
        x = self._rows(token_ids)
        if self.scale != 1.0:
            # The scale is rounded to the model's type, as in the models that have one.
            x = x * torch.tensor(self.scale, dtype=x.dtype)
        if self.projection is not None:
            x = self.projection(x)
        if self.positions is not None:
            x = x + self.positions[positions + self.offset]
        return x if self.norm is None else self.norm(x)

    def _rows(self, token_ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return functional.embedding(token_ids, self.table)
        local = token_ids - self.first
        mine = (local >= 0) & (local < self.table.shape[0])
        x = self.table.new_zeros(token_ids.shape[0], self.table.shape[1])
        x[mine] = self.table[local[mine]]
        return self.group.all_reduce(x)
