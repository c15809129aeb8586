"""Products of codes that torch has for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.quant.inputs import input_steps
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.slab_linear import SlabLinear

_INT4_GROUPS = (128, 64, 32)
_INT4_ROWS = 64  # output rows that the packed layout interleaves


class Int8Linear:
    """int8 codes times wide inputs; many rows are multiplied by widened slabs instead."""

    MOST_ROWS = 4

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._codes = matrix.codes.contiguous()
        self._scales = matrix.scales.view(-1).to(dtype)
        self._bias = bias
        self._many = SlabLinear(matrix, bias, dtype)  # shares the codes

    @staticmethod
    def takes(matrix: QuantizedMatrix) -> bool:
        """The kernel reads sixteen columns at a time, past the end if there are fewer."""
        one_scale = matrix.scales.shape[1] == 1 and matrix.zeros is None
        return matrix.kind == "int8" and one_scale and matrix.shape[1] % 32 == 0

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        if not 0 < x.shape[0] <= self.MOST_ROWS:
            return self._many(x)
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._codes, self._scales)
        return out if self._bias is None else out.add_(self._bias)


class Int4Linear:
    """int4 codes times wide inputs; many rows are multiplied by widened slabs instead.

    Scales and zeros are kept as the kernel wants them: (groups, out, 2) in the input's type, the
    second of a pair being what a code of 8 stands for.
    """

    MOST_ROWS = 8
    _SLAB_BLOCKS = 16

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._out, columns = matrix.shape
        self._group_size = self._kernel_group(matrix)
        repeat = matrix.group_size // self._group_size
        low = min(0, int(matrix.codes.min()))
        scales = matrix.scales.float()
        zeros = torch.zeros_like(scales) if matrix.zeros is None else matrix.zeros.float()
        middle = (8 + low - zeros) * scales
        pairs = torch.stack([scales.T, middle.T], dim=-1).repeat_interleave(repeat, dim=0)
        missing = -self._out % _INT4_ROWS
        codes = functional.pad(matrix.codes.to(torch.int32) - low, (0, 0, 0, missing))
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._pairs = functional.pad(pairs, (0, 0, 0, missing)).to(dtype).contiguous()
        self._columns = columns
        self._bias = bias

    @classmethod
    def _kernel_group(cls, matrix: QuantizedMatrix) -> int:
        return next((size for size in _INT4_GROUPS if matrix.group_size % size == 0), 0)

    @classmethod
    def takes(cls, matrix: QuantizedMatrix) -> bool:
        """Groups that are a multiple of 32, and a library that packs as this class unpacks."""
        return matrix.kind == "int4" and cls._kernel_group(matrix) > 0 and _packs_as_known()

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        out: Tensor
        if 0 < x.shape[0] <= self.MOST_ROWS:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self._codes, self._group_size, self._pairs
            )
        else:
            out = self._many(x)
        if self._codes.shape[0] != self._out:
            out = out[:, : self._out].contiguous()
        return out if self._bias is None else out.add_(self._bias)

    def _many(self, x: Tensor) -> Tensor:
        blocks = self._codes.view(-1, self._columns, _INT4_ROWS // 2)
        parts = []
        for start in range(0, blocks.shape[0], self._SLAB_BLOCKS):
            part = blocks[start : start + self._SLAB_BLOCKS]
            parts.append(functional.linear(x, self._widen(part, start, x.dtype)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _widen(self, blocks: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        count = blocks.shape[0]
        first = start * _INT4_ROWS
        rows = slice(first, first + count * _INT4_ROWS)
        codes = unpack_int4_blocks(blocks).view(rows.stop - rows.start, -1, self._group_size)
        pairs = self._pairs[:, rows].transpose(0, 1)
        values = (codes.to(dtype) - 8) * pairs[:, :, :1] + pairs[:, :, 1:]
        return values.view(rows.stop - rows.start, -1)


def unpack_int4_blocks(blocks: Tensor) -> Tensor:
    """(blocks, columns, 32) bytes as (blocks * 64, columns) codes.

    A block interleaves 64 output rows: for each column 32 bytes, the upper rows in the high bits.
    """
    codes = torch.cat([blocks & 15, blocks >> 4], dim=2)
    return codes.transpose(1, 2).reshape(-1, blocks.shape[1])


def _packs_as_known() -> bool:
    """Whether this processor's layout is the one above: it is the library's own business."""
    codes = torch.arange(_INT4_ROWS * 32, dtype=torch.int32).view(_INT4_ROWS, 32) * 7 // 3 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(unpack_int4_blocks(packed.view(-1, 32, _INT4_ROWS // 2)).int(), codes)


class Int8CodesLinear:
    """int8 codes times int8 inputs, a step for each input row or one fixed step.

    oneDNN has vector instructions for unsigned inputs only, hence codes around 128.
    """

    def __init__(
        self,
        matrix: QuantizedMatrix,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._codes = torch.ops.onednn.qlinear_prepack(matrix.codes.contiguous(), None)
        self._scales = matrix.scales.view(-1).float()
        self._zeros = torch.zeros(matrix.shape[0], dtype=torch.int32)
        self._bias = bias
        self._step = matrix.input_scale
        self._dtype = dtype

    @staticmethod
    def takes(matrix: QuantizedMatrix) -> bool:
        """One scale a row and inputs meant to be rounded, once `has_onednn` is known."""
        one_scale = matrix.scales.shape[1] == 1 and matrix.zeros is None
        return matrix.kind == "int8" and one_scale and matrix.quantizes_input

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        step = input_steps(x, 127.0, self._step)
        codes = (x / step).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(codes, 1.0, 128, self._codes, self._scales, self._zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        out *= step
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)
