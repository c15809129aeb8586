"""Matrices as AWQ (Lin et al. 2023) stores them: (in, out), packed along the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from splitserve.weights.arrays import grid_of, groups_of, positions_in, to_floats, to_words
from splitserve.weights.checks import (
    FLOAT_TYPES,
    check_groups,
    check_is_no_stack,
    checked_finite,
    held_bytes,
)
from splitserve.weights.grid import covering
from splitserve.weights.quantization import AwqCodes
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import Headers, StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight

_PER_WORD: Final = 8
# Of eight neighbours the even ones are in the low half of a word, the odd ones in the high half.
_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqMatrix:
    """See `StoredMatrix`. The GEMM layout, codes of 4 bits."""

    source: MatrixSource
    scheme: AwqCodes
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor

    @classmethod
    def find(cls, headers: Headers, source: MatrixSource, scheme: AwqCodes) -> AwqMatrix:
        """Checks every tensor's name, type and shape."""
        check_is_no_stack(headers, source)
        module, (rows, columns) = source.module, source.shape
        size = scheme.group_size or columns
        words = -(-rows // _PER_WORD)
        codes = headers.find(f"{module}.qweight", (columns, words), types=["I32"])
        check_groups(codes, columns, size)
        groups = columns // size
        return cls(
            source=source,
            scheme=scheme,
            codes=codes,
            scales=headers.find(f"{module}.scales", (groups, rows), types=FLOAT_TYPES),
            zeros=headers.find(f"{module}.qzeros", (groups, words), types=["I32"]),
        )

    @property
    def weight_bytes(self) -> float:
        """See `StoredMatrix.weight_bytes`."""
        return held_bytes(4, self.scheme.group_size or self.source.shape[1])

    def read(self, dtype: torch.dtype) -> Weight:
        """See `StoredMatrix.read`. The codes are as they are stored, so `dtype` has no part."""
        from splitserve.weights.coded import from_unsigned

        rows, width = self.source.shape
        columns = self.source.columns or range(width)
        spans = self.source.rows or [range(rows)]
        codes = _unpacked(self.codes, [columns], spans)
        _, groups = groups_of(columns, self.scheme.group_size or width)
        stored = to_floats(grid_of(self.scales).read(None, spans), self.scales.dtype)
        scales = checked_finite(stored, self.scales)[groups].T
        zeros = _unpacked(self.zeros, None, spans)[:, groups].astype(np.float32)
        return from_unsigned(4, codes, scales, zeros)


def _unpacked(
    stored: StoredTensor, inputs: Sequence[range] | None, outputs: Sequence[range]
) -> NDArray[np.uint8]:
    """(outputs, inputs) of words packed along the outputs."""
    covers = covering(outputs, _PER_WORD)
    words = np.ascontiguousarray(to_words(grid_of(stored).read(inputs, covers)).T)
    codes = np.empty((len(words), _PER_WORD, words.shape[1]), np.uint8)
    for row, places in zip(words, codes, strict=True):
        for output, place in enumerate(_PLACES):
            np.bitwise_and(row >> np.uint32(4 * place), 15, out=places[output], casting="unsafe")
    positions = positions_in(outputs, covers, _PER_WORD)
    rows = codes.reshape(-1, words.shape[1])
    return rows if len(positions) == len(rows) else rows[positions]
