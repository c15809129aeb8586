"""Products of codes that torch has for NVIDIA GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.quant.inputs import input_steps
from splitserve.quant.matrix import FP8_MAX, QuantizedMatrix

_LEAST_INT_ROWS = 17  # cuBLASLt refuses fewer


class Fp8Linear:
    """e4m3 codes times e4m3 inputs on tensor cores, a step for each input row or one fixed step."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._codes = matrix.codes.contiguous().t()
        self._scales = matrix.scales.view(1, -1).float().contiguous()
        self._bias = None if bias is None else bias.to(torch.bfloat16)
        self._step = matrix.input_scale

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        """Row scales, bf16 out, sides that are multiples of 16, and Hopper or later."""
        rows, columns = matrix.shape
        one_scale = matrix.scales.shape[1] == 1 and matrix.zeros is None
        fits = rows % 16 == 0 and columns % 16 == 0 and dtype is torch.bfloat16
        if matrix.kind != "fp8" or not one_scale or not fits:
            return False
        return torch.cuda.get_device_capability(matrix.codes.device) >= (9, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        step = input_steps(x, FP8_MAX, self._step)
        codes = (x / step).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            codes, self._codes, step, self._scales, bias=self._bias, out_dtype=torch.bfloat16
        )


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
