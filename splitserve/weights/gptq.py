"""Matrices as GPTQ (Frantar et al. 2022) stores them: (in, out), packed along the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from splitserve.weights.arrays import (
    Floats,
    grid_of,
    positions_in,
    to_floats,
    to_words,
    unpack_rows,
)
from splitserve.weights.checks import (
    FLOAT_TYPES,
    check_groups,
    check_is_no_stack,
    checked_finite,
    held_bytes,
    read_group_of_columns,
)
from splitserve.weights.grid import covering
from splitserve.weights.quantization import GptqCodes
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import Headers, StoredTensor

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight


@dataclass(frozen=True)
class GptqMatrix:
    """See `StoredMatrix`."""

    source: MatrixSource
    scheme: GptqCodes
    codes: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor
    order: StoredTensor | None

    @classmethod
    def find(cls, headers: Headers, source: MatrixSource, scheme: GptqCodes) -> GptqMatrix:
        """Checks every tensor's name, type and shape."""
        check_is_no_stack(headers, source)
        module, (rows, columns) = source.module, source.shape
        size, per_word = scheme.group_size or columns, 32 // scheme.bits
        name = f"{module}.qweight"
        codes = headers.find(name, (-(-columns // per_word), rows), types=["I32"])
        check_groups(codes, columns, size)
        groups, order = columns // size, None
        if f"{module}.g_idx" in headers:
            order = headers.find(f"{module}.g_idx", (columns,), types=["I32", "I64"])
        packed = groups, -(-rows // per_word)
        return cls(
            source=source,
            scheme=scheme,
            codes=codes,
            scales=headers.find(f"{module}.scales", (groups, rows), types=FLOAT_TYPES),
            zeros=headers.find(f"{module}.qzeros", packed, types=["I32"]),
            order=order,
        )

    @property
    def weight_bytes(self) -> float:
        """See `StoredMatrix.weight_bytes`."""
        return held_bytes(self.scheme.bits, self.scheme.group_size or self.source.shape[1])

    def read(self, dtype: torch.dtype) -> Weight:
        """See `StoredMatrix.read`; dense if it cuts a matrix with an order (act-order)."""
        from splitserve.weights.coded import from_groups

        width = self.source.shape[1]
        size, columns = self.scheme.group_size or width, self.source.columns or range(width)
        data = grid_of(self.scales).read(None, self.source.rows)
        scales = checked_finite(to_floats(data, self.scales.dtype), self.scales)
        return from_groups(
            bits=self.scheme.bits,
            codes=self._read_codes(columns),
            scales=scales.T,
            zeros=self._read_zeros(),
            columns=columns,
            group_size=size,
            group=read_group_of_columns(self.order, size),
            dtype=dtype,
        )

    def _read_codes(self, columns: range) -> NDArray[np.uint8]:
        bits, per_word = self.scheme.bits, 32 // self.scheme.bits
        (words,) = covering([columns], per_word)
        packed = to_words(grid_of(self.codes).read([words], self.source.rows))
        skip = columns.start - words.start * per_word
        upright = np.ascontiguousarray(packed.T)
        return np.ascontiguousarray(unpack_rows(upright, bits, skip, len(columns)))

    def _read_zeros(self) -> Floats:
        """(rows that are taken, all groups)."""
        bits, per_word = self.scheme.bits, 32 // self.scheme.bits
        spans = self.source.rows or [range(self.source.shape[0])]
        words = covering(spans, per_word)
        packed = to_words(grid_of(self.zeros).read(None, words))
        zeros = unpack_rows(packed, bits, 0, packed.shape[1] * per_word)
        zeros = zeros[:, positions_in(spans, words, per_word)]
        if self.scheme.zeros_less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
        return zeros.T.astype(np.float32)
