"""Weights that are stored in llama.cpp's blocks. Only reading needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

import numpy as np

from splitserve.weights.arrays import Codes, Floats, groups_of
from splitserve.weights.checks import checked_finite, held_bytes
from splitserve.weights.ggml_blocks import BLOCK_TYPES, BlockType, Decoded
from splitserve.weights.grid import Grid, merged, pieces
from splitserve.weights.source import MatrixSource, TensorSource
from splitserve.weights.stored import StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import QuantizedMatrix

_SLAB_WEIGHTS: Final = 1 << 20


@dataclass(frozen=True)
class BlockMatrix:
    """See `StoredMatrix`."""

    stored: StoredTensor
    source: MatrixSource

    @property
    def weight_bytes(self) -> float:
        """See `StoredMatrix.weight_bytes`."""
        block = BLOCK_TYPES[self.stored.dtype]
        return held_bytes(4 if block.kind == "int4" else 8, block.group_size)

    def read(self, dtype: torch.dtype) -> QuantizedMatrix:
        """See `StoredMatrix.read`. The codes are as they are stored, so `dtype` has no part."""
        from splitserve.weights.coded import quantized_matrix

        block = BLOCK_TYPES[self.stored.dtype]
        height, width = self.source.read_shape
        columns = self.source.columns or range(self.source.shape[1])
        size, groups = groups_of(columns, block.group_size)
        # Both count from the first block that is read.
        skipped = columns.start // block.elements * block.elements
        taken = slice(columns.start - skipped, columns.stop - skipped)
        groups = groups - skipped // block.group_size
        codes = np.empty((height, width), np.int8)
        scales = np.empty((height, width // size), np.float32)
        zeros: Floats | None = None
        for top, part in self._slabs(columns, block):
            bottom = top + len(part[0])
            codes[top:bottom] = part[0][:, taken]
            scale, minimum = part[1][:, groups], part[2]
            if minimum is not None:
                zeros = np.empty_like(scales) if zeros is None else zeros
                scale, zeros[top:bottom] = _zeros(scale, minimum[:, groups], codes[top:bottom])
            scales[top:bottom] = scale
        checked_finite(scales, self.stored)
        if zeros is not None:
            checked_finite(zeros, self.stored)
        return quantized_matrix(block.kind, codes, scales, zeros)

    def _slabs(self, columns: range, block: BlockType) -> Iterator[tuple[int, Decoded]]:
        rows, width = self.source.shape
        blocks = range(columns.start // block.elements, -(-columns.stop // block.elements))
        grid = Grid(self.stored, rows, width // block.elements, block.size_bytes, self.source.index)
        return _decoded_slabs(grid, self.source.rows or [range(rows)], blocks, block)


def read_block_tensor(
    stored: StoredTensor, source: TensorSource, dtype: torch.dtype
) -> torch.Tensor:
    """What the source takes, as numbers: the format's own arithmetic in fp32, rounded once."""
    import torch

    block = BLOCK_TYPES[stored.dtype]
    width = source.shape[-1]
    rows = prod(source.shape[:-1])
    grid = Grid(stored, rows, width // block.elements, block.size_bytes, source.index)
    taken = source.rows or [range(rows)]
    out = torch.empty(prod(source.read_shape) // width, width, dtype=dtype)
    for top, (codes, scales, minima) in _decoded_slabs(grid, taken, range(grid.width), block):
        values = codes.reshape(*scales.shape, -1).astype(np.float32)
        values *= scales[:, :, None]
        if minima is not None:
            values += minima[:, :, None]
        out[top : top + len(codes)] = torch.from_numpy(values.reshape(len(codes), width))
    return out.reshape(source.read_shape)


def _decoded_slabs(
    grid: Grid, rows: Sequence[range], blocks: range, block: BlockType
) -> Iterator[tuple[int, Decoded]]:
    """A bounded number of rows at a time, each with how many came before."""
    height = max(1, _SLAB_WEIGHTS // (len(blocks) * block.elements))
    for top, part in pieces(merged(rows), height):
        data = grid.read([part], [blocks])
        # A file may hold any numbers. Those that are none pass here, as in a plain tensor.
        with np.errstate(all="ignore"):
            codes, scales, minima = block.decode(data.reshape(-1, block.size_bytes))
        shape = (len(part), -1)
        low = None if minima is None else minima.reshape(shape)
        yield top, (codes.reshape(shape), scales.reshape(shape), low)


def _zeros(scales: Floats, minima: Floats, codes: Codes) -> tuple[Floats, Floats]:
    """Scales and zeros so that `(code - zero) * scale` is `code * scale + minimum`.

    A group without a scale holds its minimum everywhere: its codes become 0, its scale 1.
    """
    flat = scales == 0
    if flat.any():
        grouped = codes.reshape(*scales.shape, -1)
        grouped[flat] = 0
        scales = np.where(flat, np.float32(1), scales)
    with np.errstate(all="ignore"):
        return scales, -minima / scales
