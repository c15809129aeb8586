"""Rounding that makes up for itself: GPTQ (Frantar et al. 2023)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_int4

# Of the mean curvature: keeps columns apart whose inputs were nearly the same.
_DAMPING: Final = 0.01


def quantize_int4_gptq(weight: Tensor, inputs: Tensor, group_size: int = 32) -> QuantizedMatrix:
    """4 bits, column by column: what rounding a column changed in the product is made up for, as
    far as inputs are correlated, in the columns that are not rounded yet.

    `inputs` are rows that the layer saw, (rows, columns). Groups get their scale and zero from
    what their columns have become. Raises `ValueError` if `group_size` does not divide the
    columns.
    """
    rest = weight.float().clone()
    carry = _carry(inputs.float())
    parts = []
    for first in range(0, weight.shape[1], group_size):
        end = first + group_size
        part, errors = _round_group(rest[:, first:end], carry[first:end, first:end])
        parts.append(part)
        rest[:, end:] -= errors @ carry[first:end, end:]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedMatrix(
        "int4",
        torch.cat([part.codes for part in parts], dim=1),
        torch.cat([part.scales for part in parts], dim=1),
        torch.cat(zeros, dim=1),
    )


def _carry(inputs: Tensor) -> Tensor:
    """Row i says how an error in column i is made up for in the columns after it: the upper
    Cholesky factor of the inverse curvature, (columns, columns).
    """
    curvature = inputs.T @ inputs
    damping = _DAMPING * curvature.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    curvature.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _round_group(group: Tensor, carry: Tensor) -> tuple[QuantizedMatrix, Tensor]:
    """Codes of (rows, group_size) weights, and each column's error over its own carry."""
    made = quantize_int4(group, group.shape[1])
    assert made.zeros is not None
    scales, zeros = made.scales, made.zeros
    left, errors = group.clone(), torch.empty_like(group)
    for column in range(group.shape[1]):
        value = left[:, column : column + 1]
        code = (value / scales + zeros).round_().clamp_(0, 15)
        made.codes[:, column] = code[:, 0].to(torch.int8)
        error = (value - (code - zeros) * scales) / carry[column, column]
        errors[:, column] = error[:, 0]
        left[:, column + 1 :] -= error * carry[column : column + 1, column + 1 :]
    return made, errors
