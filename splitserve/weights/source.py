"""Where a weight lies in a checkpoint and which part of it is wanted. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TensorSource:
    """A vector or a table: a norm's weight, a bias, an embedding.

    `shape` is the whole tensor's. `rows` are the parts of the first dimension that are taken, in
    that order, None for all. `index` takes one of a stored stack of `stack` such tensors.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[range, ...] | None = None
    index: int = 0
    stack: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the checkpoint must have."""
        return (self.stack, *self.shape) if self.stack else self.shape

    @property
    def read_shape(self) -> tuple[int, ...]:
        """The shape of what is taken."""
        if self.rows is None:
            return self.shape
        return (sum(len(rows) for rows in self.rows), *self.shape[1:])


@dataclass(frozen=True)
class MatrixSource:
    """A projection's (out, in) matrix, which may be stored quantised.

    `name` is the plain weight's tensor, such as `model.layers.0.self_attn.q_proj.weight`; a
    quantised checkpoint has others of the same module in its place. `shape` is the whole
    matrix's. `rows` and `columns` are the parts that are taken, None for all. `transposed`
    says that (in, out) is stored (GPT-2's Conv1D). `index` takes one of a stored stack of `stack`
    matrices (experts).
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[range, ...] | None = None
    columns: range | None = None
    transposed: bool = False
    index: int = 0
    stack: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the checkpoint must have if it is not quantised."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return (self.stack, *shape) if self.stack else shape

    @property
    def read_shape(self) -> tuple[int, int]:
        """The (out, in) shape of what is taken."""
        rows, columns = self.shape
        if self.rows is not None:
            rows = sum(len(part) for part in self.rows)
        return rows, columns if self.columns is None else len(self.columns)

    @property
    def module(self) -> str:
        """`name` without `.weight`, which quantised tensors' names start with."""
        return self.name.removesuffix(".weight")

    @property
    def parameters(self) -> int:
        """How many weights are taken."""
        return prod(self.read_shape)
