"""From the last hidden state to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.models.linear import Linear
from splitserve.parallel.group import Group


@dataclass(frozen=True)
class Unembedding:
    """Scores of all tokens, in the model's type unless they are scaled. Each rank has `width` of
    them, the last ones padded.
    """

    product: Linear
    vocab_size: int
    width: int
    group: Group
    projection: Linear | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(rows, vocab_size) for (rows, hidden_size)."""
        if self.projection is not None:
            hidden = self.projection(hidden)
        logits = self.product(hidden)
        if self.group.size > 1:
            padding = self.width - logits.shape[-1]
            logits = self.group.all_gather_columns(functional.pad(logits, (0, padding)))
            logits = logits[:, : self.vocab_size]
        if self.scale != 1.0 or self.soft_cap is not None:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits
