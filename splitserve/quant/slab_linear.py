"""A product for any codes on any device: widened slab by slab, never all at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.quant.matrix import QuantizedMatrix

_FP8_HALF = 256.0
_CPU_SLAB_WEIGHTS = 1 << 20
_GPU_SLAB_WEIGHTS = 1 << 26


class SlabLinear:
    """Keeps codes, int4 two a byte, and widens some rows at a time for a library's product.

    Order, smoothing and rounding of the input are the caller's. Where a row has one scale, codes
    are multiplied as they are, since each is exact in bf16, and the result is scaled.
    """

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._shape = matrix.shape
        self._group_size = matrix.group_size
        self._dtype = dtype
        self._bias = bias
        self._low = 0
        self._packed = matrix.kind == "int4" and matrix.shape[1] % 2 == 0
        if self._packed:
            self._low = min(0, int(matrix.codes.min()))
            self._codes = pack_nibbles(matrix.codes - self._low)
        else:
            self._codes = matrix.codes.contiguous()
        self._fp8 = matrix.kind == "fp8"
        self._scales = matrix.scales.float() * (_FP8_HALF if self._fp8 else 1)
        self._zeros = None if matrix.zeros is None else matrix.zeros.float()
        self._row_scaled = (
            matrix.scales.shape[1] == 1 and matrix.zeros is None and dtype is not torch.float16
        )
        on_cpu = matrix.codes.device.type == "cpu"
        budget = _CPU_SLAB_WEIGHTS if on_cpu else _GPU_SLAB_WEIGHTS
        self._slab = max(1, budget // matrix.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        rows = self._shape[0]
        if rows <= self._slab:
            out = self._slab_product(x, 0, rows)
        else:
            out = x.new_empty(x.shape[0], rows)
            for start in range(0, rows, self._slab):
                end = min(start + self._slab, rows)
                out[:, start:end] = self._slab_product(x, start, end)
        return out if self._bias is None else out.add_(self._bias)

    def _slab_product(self, x: Tensor, start: int, end: int) -> Tensor:
        codes = self._codes[start:end]
        if self._packed:
            codes = unpack_nibbles(codes)
        elif self._fp8:
            codes = fp8_as_half(codes)
        if self._row_scaled:
            wide = codes.to(x.dtype)
            if self._low:
                wide += self._low
            return functional.linear(x, wide).mul_(self._scales[start:end, 0])
        values = codes.float().view(end - start, -1, self._group_size)
        scales = self._scales[start:end, :, None]
        if self._zeros is not None:
            values -= self._zeros[start:end, :, None] - self._low
        elif self._low:
            values += self._low
        return functional.linear(x, (values * scales).view(end - start, -1).to(x.dtype))


def fp8_as_half(codes: Tensor) -> Tensor:
    """e4m3 numbers divided by 256, exactly, by moving bits; torch's own conversion is 50 x slower.

    Both formats have numbers below the normal ones in the same way. The one code that is not a
    number becomes 480 / 256.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    return (bits.bitwise_left_shift_(7)).bitwise_and_(~0x4000).view(torch.float16)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(rows, columns) codes 0..15 as (rows, columns / 2) bytes; the right half is the high bits."""
    left, right = codes.to(torch.uint8).chunk(2, dim=1)
    return left | (right << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`, uint8."""
    return torch.cat([packed & 15, packed >> 4], dim=1)
