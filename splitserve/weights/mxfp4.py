"""Experts in MXFP4 (OCP Microscaling 1.0), as gpt-oss stores them: FP4 in groups of 32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from splitserve.errors import CheckpointError
from splitserve.weights.arrays import groups_of
from splitserve.weights.checks import held_bytes
from splitserve.weights.grid import Grid, covering
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import Headers, StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight

_GROUP: Final = 32
_GROUP_BYTES: Final = 16
_EXPONENT_BIAS: Final = 127
_NOT_A_NUMBER: Final = 255
# Twice the values of E2M1, which are whole numbers; the fourth bit is the sign.
_DOUBLED: Final = np.array(
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8
)  # fmt: skip


@dataclass(frozen=True)
class Mxfp4Matrix:
    """See `StoredMatrix`. One of a stack, stored (out, in) whatever the plain form's order is.

    Twice an FP4 value is a small whole number: so it is read as int8 with half the scale.
    """

    source: MatrixSource
    codes: StoredTensor
    scales: StoredTensor

    @classmethod
    def find(cls, headers: Headers, source: MatrixSource) -> Mxfp4Matrix:
        """Checks every tensor's name, type and shape."""
        rows, columns = source.shape
        if columns % _GROUP or not source.stack:
            raise CheckpointError(
                f"{headers.path}: tensor '{source.name}_blocks' of {columns} columns cannot be "
                f"MXFP4, expected a stack of matrices with a multiple of {_GROUP}"
            )
        shape = source.stack, rows, columns // _GROUP
        return cls(
            source=source,
            codes=headers.find(f"{source.name}_blocks", (*shape, _GROUP_BYTES), types=["U8"]),
            scales=headers.find(f"{source.name}_scales", shape, types=["U8"]),
        )

    @property
    def weight_bytes(self) -> float:
        """See `StoredMatrix.weight_bytes`."""
        return held_bytes(8, _GROUP)

    def read(self, dtype: torch.dtype) -> Weight:
        """See `StoredMatrix.read`. The codes are as they are stored, so `dtype` has no part."""
        from splitserve.weights.coded import quantized_matrix

        source = self.source
        height, width = source.shape
        columns = source.columns or range(width)
        covers = covering([columns], _GROUP)
        blocks = Grid(self.codes, height, width // _GROUP, _GROUP_BYTES, source.index)
        data = blocks.read(source.rows, covers)
        codes = np.empty((*data.shape, 2), np.int8)
        codes[:, :, 0] = _DOUBLED[data & 15]
        codes[:, :, 1] = _DOUBLED[data >> 4]
        skip = columns.start - covers[0].start * _GROUP
        taken = codes.reshape(len(data), -1)[:, skip : skip + len(columns)]
        _, groups = groups_of(columns, _GROUP)
        grid = Grid(self.scales, height, width // _GROUP, 1, source.index)
        stored = grid.read(source.rows)[:, groups]
        if (stored == _NOT_A_NUMBER).any():
            raise self.scales.error("has numbers that are not finite")
        scales = np.ldexp(np.float32(0.5), stored.astype(np.int32) - _EXPONENT_BIAS)
        return quantized_matrix("int8", np.ascontiguousarray(taken), scales)
