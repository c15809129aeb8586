"""Weights that are stored as plain numbers. Only reading needs torch, checking does not."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from splitserve.weights.arrays import ITEM_BYTES, grid_of
from splitserve.weights.grid import Bytes, Grid
from splitserve.weights.source import MatrixSource, TensorSource
from splitserve.weights.stored import PLAIN_TYPES, Headers, StoredTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DenseMatrix:
    """See `StoredMatrix`."""

    stored: StoredTensor
    source: MatrixSource

    @classmethod
    def find(cls, headers: Headers, source: MatrixSource) -> DenseMatrix:
        """Checks name, shape and type."""
        stored = headers.find(source.name, source.stored_shape)
        check_is_plain(stored)
        return cls(stored, source)

    @property
    def weight_bytes(self) -> None:
        """See `StoredMatrix.weight_bytes`."""
        return None

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """See `StoredMatrix.read`."""
        source = self.source
        columns = None if source.columns is None else [source.columns]
        grid = grid_of(self.stored, source.index)
        if source.transposed:
            data = grid.read(columns, source.rows)
            return to_tensor(data, self.stored.dtype).to(dtype).t().contiguous()
        return to_tensor(grid.read(source.rows, columns), self.stored.dtype).to(dtype)


def find_dense_tensor(headers: Headers, source: TensorSource) -> StoredTensor:
    """The tensor of a source that is stored as plain numbers."""
    stored = headers.find(source.name, source.stored_shape)
    check_is_plain(stored)
    return stored


def read_dense_tensor(
    stored: StoredTensor, source: TensorSource, dtype: torch.dtype
) -> torch.Tensor:
    """What the source takes of it, contiguous."""
    rows, *rest = source.shape or (1,)
    grid = Grid(stored, rows, prod(rest), ITEM_BYTES[stored.dtype], source.index)
    data = to_tensor(grid.read(source.rows), stored.dtype)
    return data.to(dtype).reshape(source.read_shape)


def check_is_plain(stored: StoredTensor) -> None:
    """Raises `CheckpointError` for a type that does not hold plain numbers."""
    if stored.dtype not in PLAIN_TYPES:
        raise stored.error(f"is of type {stored.dtype}, which holds no plain weights")


def to_tensor(data: Bytes, dtype: str) -> torch.Tensor:
    """(rows, bytes) as numbers of a type of safetensors, without a copy."""
    # Here and not above: the router opens checkpoints where no torch is installed.
    import torch

    types = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "I8": torch.int8,
    }
    return torch.from_numpy(data).view(types[dtype])
