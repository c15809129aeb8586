"""A weight matrix as codes and scales, whatever file or quantiser it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

CodeKind: TypeAlias = Literal["int4", "int8", "fp8"]

FP8_MAX = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A (rows, columns) matrix, one byte a code, as `(code - zero) * scale`.

    `codes` is (rows, columns): int8 for int4 and int8, float8_e4m3fn for fp8. Those of int4 are
    in -8..7 or, mostly with zeros, in 0..15: one of the two in all of a matrix.
    `scales` is (rows, groups) fp32; column i belongs to group i // (columns // groups). `zeros`
    is like `scales`, None where all are 0. Column i multiplies `x[input_order[i]]` if there is
    an order (GPTQ's act-order), and all of x is divided by `smoothing`, (columns,) fp32 in the
    order of x, if there is one (SmoothQuant, AWQ). `quantizes_input` says that activations are
    meant to be quantised, too, by `input_scale` or, without one, row by row.

    One byte a code even for int4: products pack codes as their kernel likes.
    """

    kind: CodeKind
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    input_order: Tensor | None = None
    smoothing: Tensor | None = None
    quantizes_input: bool = False
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight that x itself is multiplied by: order and smoothing are undone."""
        rows, columns = self.shape
        values = self.codes.float().view(rows, -1, self.group_size)
        if self.zeros is not None:
            values = values - self.zeros[:, :, None]
        weight = (values * self.scales[:, :, None]).view(rows, columns)
        if self.input_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.input_order, weight)
        if self.smoothing is not None:
            weight = weight / self.smoothing
        return weight.to(dtype)

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The same on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=move(self.zeros),
            input_order=move(self.input_order),
            smoothing=move(self.smoothing),
        )


Weight: TypeAlias = Tensor | QuantizedMatrix
"""A weight of shape (out, in)."""


def stack_rows(parts: Sequence[Weight]) -> Weight:
    """Projections of one input as one matrix, the first on top.

    Quantised parts must be alike: kind, groups, order and smoothing. Where they are not, the
    caller keeps them apart. Raises `ValueError`.
    """
    dense = [part for part in parts if isinstance(part, Tensor)]
    if len(dense) == len(parts):
        return dense[0] if len(dense) == 1 else torch.cat(dense)
    coded = [part for part in parts if isinstance(part, QuantizedMatrix)]
    if len(coded) != len(parts) or not all(_stackable(coded[0], each) for each in coded[1:]):
        raise ValueError("these weights are not quantised alike")
    first = coded[0]
    if len(coded) == 1:
        return first
    zeros = [part.zeros for part in coded if part.zeros is not None]
    return replace(
        first,
        codes=torch.cat([part.codes for part in coded]),
        scales=torch.cat([part.scales for part in coded]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def can_stack(parts: Sequence[Weight]) -> bool:
    """Whether `stack_rows` takes them."""
    first = parts[0]
    if isinstance(first, Tensor):
        return all(isinstance(part, Tensor) for part in parts)
    return all(isinstance(p, QuantizedMatrix) and _stackable(first, p) for p in parts[1:])


def _stackable(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    return (
        (a.kind, a.group_size, a.quantizes_input, a.input_scale)
        == (b.kind, b.group_size, b.quantizes_input, b.input_scale)
        and (a.zeros is None) == (b.zeros is None)
        and _same(a.input_order, b.input_order)
        and _same(a.smoothing, b.smoothing)
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
