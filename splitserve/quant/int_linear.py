"""Products of int8 and int4 codes with 16-bit inputs on GPUs. Imports triton: only there."""

from __future__ import annotations

from dataclasses import replace

import torch
from splitserve_kernels.small_linear_int import (
    GROUPS,
    PackedCodes,
    pack_int4,
    pack_int8,
    small_linear_int,
    unpack,
)
from splitserve_kernels.small_tiles import MAX_ROWS
from torch import Tensor
from torch.nn import functional

from splitserve.quant.matrix import QuantizedMatrix

_SLAB_WEIGHTS = 1 << 25
_LEAST_GROUP = 64


class IntLinear:
    """Few rows read the codes as they are; for many, the weight is widened slab by slab."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None) -> None:
        if matrix.kind == "int4":
            self._weight = pack_int4(matrix.codes, matrix.scales, matrix.zeros)
        else:
            self._weight = pack_int8(matrix.codes, matrix.scales)
        self._bias = bias
        self._slab = max(1, _SLAB_WEIGHTS // matrix.shape[1])

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        """Groups that the kernel can read, 16-bit inputs, whole zeros."""
        columns, group = matrix.shape[1], matrix.group_size
        if matrix.codes.device.type != "cuda" or dtype.itemsize != 2:
            return False
        if matrix.kind == "int8":
            return matrix.zeros is None and group % _LEAST_GROUP == 0
        fits = columns % (2 * group) == 0 and _are_small(matrix)
        return matrix.kind == "int4" and group in GROUPS and fits

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        if x.shape[0] <= MAX_ROWS:
            return small_linear_int(x, self._weight, bias=self._bias)
        rows = self._weight.shape[0]
        out = x.new_empty(x.shape[0], rows)
        for start in range(0, rows, self._slab):
            end = min(start + self._slab, rows)
            wide = unpack(self._rows(start, end)).to(x.dtype)
            out[:, start:end] = functional.linear(x, wide)
        return out if self._bias is None else out.add_(self._bias)

    def _rows(self, start: int, end: int) -> PackedCodes:
        weight = self._weight
        return replace(weight, codes=weight.codes[start:end], steps=weight.steps[:, start:end])


def _are_small(matrix: QuantizedMatrix) -> bool:
    """Whether the zeros are whole numbers that fit the kernel's 7 bits once codes are above 0."""
    zeros = matrix.zeros
    if zeros is None:
        return True
    lift = 8 if bool((matrix.codes < 0).any()) else 0
    return bool(((zeros == zeros.round()) & (zeros >= -lift) & (zeros + lift < 128)).all())
