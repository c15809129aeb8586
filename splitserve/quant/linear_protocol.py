"""What a product of any kind looks like."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """`x @ weight.T + bias` for (rows, in) inputs and a weight of shape (out, in)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (rows, out), the type of `x`."""
        ...
