"""The fastest product that can read a matrix's codes."""

from __future__ import annotations

import torch
from torch import Tensor

from splitserve.quant import cpu_linear, cuda_linear
from splitserve.quant.code_memory import has_onednn
from splitserve.quant.inputs import RoundedInput, TransformedInput
from splitserve.quant.linear_protocol import Linear
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.slab_linear import SlabLinear
from splitserve.quant.vnni.linear import VnniLinear


def make_quantized_linear(
    matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Linear:
    """A product of inputs of type `dtype` with the matrix, which is moved to the device.

    Any matrix is taken; one that no fast product can represent is widened slab by slab in each
    call, so that memory stays what codes need. Raises `ValueError` for codes out of range.
    """
    _check_codes(matrix)
    matrix = matrix.to(device)
    if bias is not None:
        bias = bias.to(device=device, dtype=dtype)
    product = _choose(matrix, bias, dtype)
    if matrix.smoothing is None and matrix.input_order is None:
        return product
    return TransformedInput(product, matrix.smoothing, matrix.input_order)


def _check_codes(matrix: QuantizedMatrix) -> None:
    """Products shift codes to 0..15: out of range, they would spill into their neighbours."""
    if matrix.kind != "int4" or matrix.codes.numel() == 0:
        return
    low, high = (int(each) for each in matrix.codes.aminmax())
    if low < -8 or high > (7 if low < 0 else 15):
        raise ValueError(f"int4 codes must be in -8..7 or in 0..15, not in {low}..{high}")


def _choose(matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """A product that rounds its input if the matrix wants that."""
    if VnniLinear.takes(matrix, dtype):
        return VnniLinear(matrix, bias)
    if matrix.codes.device.type == "cuda":
        # Only machines with a GPU need triton.
        from splitserve.quant.fp8_linear import Fp8Linear

        if Fp8Linear.takes(matrix, dtype):
            return Fp8Linear(matrix, bias, dtype)
        if cuda_linear.Int8CodesGpuLinear.takes(matrix):
            return cuda_linear.Int8CodesGpuLinear(matrix, bias, dtype)
    elif has_onednn() and cpu_linear.Int8CodesLinear.takes(matrix):
        return cpu_linear.Int8CodesLinear(matrix, bias, dtype)
    product = _choose_wide(matrix, bias, dtype)
    if not matrix.quantizes_input:
        return product
    return RoundedInput(product, fp8=matrix.kind == "fp8", scale=matrix.input_scale)


def _choose_wide(matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """A product whose input stays as it is."""
    if matrix.codes.device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        if cpu_linear.Int8Linear.takes(matrix):
            return cpu_linear.Int8Linear(matrix, bias, dtype)
        if cpu_linear.Int4Linear.takes(matrix):
            return cpu_linear.Int4Linear(matrix, bias, dtype)
    elif matrix.codes.device.type == "cuda":
        # Only machines with a GPU need triton.
        from splitserve.quant.int_linear import IntLinear

        if IntLinear.takes(matrix, dtype):
            return IntLinear(matrix, bias)
    return SlabLinear(matrix, bias, dtype)
