"""Makes quantised matrices of arrays. Imports torch: readers import this when they read."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from splitserve.quant.matrix import CodeKind, QuantizedMatrix, Weight
from splitserve.weights.arrays import Codes, Floats, groups_of

_DENSE_SLAB: Final = 1 << 18


def quantized_matrix(
    kind: CodeKind, codes: Codes | torch.Tensor, scales: Floats, zeros: Floats | None = None
) -> QuantizedMatrix:
    """One on the CPU, sharing the arrays' memory."""
    return QuantizedMatrix(
        kind=kind,
        codes=codes if isinstance(codes, torch.Tensor) else torch.from_numpy(codes),
        scales=torch.from_numpy(np.ascontiguousarray(scales)),
        zeros=None if zeros is None else torch.from_numpy(np.ascontiguousarray(zeros)),
    )


def from_unsigned(
    bits: int, codes: NDArray[np.uint8], scales: Floats, zeros: Floats
) -> QuantizedMatrix:
    """Codes of 0 to 2**bits - 1, with their zeros. `codes` is changed.

    Where all zeros are the middle, as in symmetric quantisation, they are taken off the codes.
    Eight-bit codes are moved to what int8 holds.
    """
    middle = 1 << (bits - 1)
    symmetric = bool((zeros == middle).all())
    if bits == 8 or symmetric:
        codes -= np.uint8(middle)  # Wraps around: the same bits as the signed difference.
        zeros = zeros - middle
    kind: CodeKind = "int4" if bits == 4 else "int8"
    return quantized_matrix(kind, codes.view(np.int8), scales, None if symmetric else zeros)


def from_groups(
    bits: int,
    codes: NDArray[np.uint8],
    scales: Floats,
    zeros: Floats,
    columns: range,
    group_size: int,
    group: NDArray[np.intp] | None,
    dtype: torch.dtype,
) -> Weight:
    """Codes of `columns` with the scales and zeros of all stored groups. `codes` is changed.

    `group` has the group of every column of the whole matrix, None where they are in order. Part
    of the columns of a matrix without such order has groups of unequal size, which codes cannot
    express: it becomes dense, in `dtype`.
    """
    if group is None:
        _, groups = groups_of(columns, group_size)
        return from_unsigned(bits, codes, scales[:, groups], zeros[:, groups])
    if len(columns) < len(group):
        return _dense(codes, scales, zeros, group[columns.start : columns.stop], dtype)
    order = np.argsort(group, kind="stable")
    matrix = from_unsigned(bits, np.take(codes, order, axis=1), scales, zeros)
    return replace(matrix, input_order=torch.from_numpy(order))


def _dense(
    codes: NDArray[np.uint8],
    scales: Floats,
    zeros: Floats,
    group: NDArray[np.intp],
    dtype: torch.dtype,
) -> torch.Tensor:
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype)
    height = max(1, _DENSE_SLAB // columns)
    for top in range(0, rows, height):
        part = slice(top, top + height)
        values = codes[part].astype(np.float32)
        values -= np.take(zeros[part], group, axis=1)
        values *= np.take(scales[part], group, axis=1)
        out[part] = torch.from_numpy(values)
    return out
