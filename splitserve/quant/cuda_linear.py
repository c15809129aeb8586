"""Products of codes that torch has for NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.quant.inputs import input_steps
from splitserve.quant.matrix import QuantizedMatrix

_LEAST_INT_ROWS = 17  # cuBLASLt refuses fewer


class Int8CodesGpuLinear:
    """int8 codes times int8 inputs on tensor cores, a step for each input row or one fixed step."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._codes = matrix.codes.contiguous().t()
        self._scales = matrix.scales.view(1, -1).float()
        self._bias = bias
        self._step = matrix.input_scale

    @staticmethod
    def takes(matrix: QuantizedMatrix) -> bool:
        """One scale a row, rounded inputs, and sides that are multiples of 8."""
        rows, columns = matrix.shape
        one_scale = matrix.scales.shape[1] == 1 and matrix.zeros is None
        fits = rows % 8 == 0 and columns % 8 == 0
        return matrix.kind == "int8" and one_scale and matrix.quantizes_input and fits

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        rows = x.shape[0]
        step = input_steps(x, 127.0, self._step)
        codes = (x / step).round_().clamp_(-127, 127).to(torch.int8)
        if rows < _LEAST_INT_ROWS:
            codes = functional.pad(codes, (0, 0, 0, _LEAST_INT_ROWS - rows))
        out = torch._int_mm(codes, self._codes)[:rows] * (step * self._scales)
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)
