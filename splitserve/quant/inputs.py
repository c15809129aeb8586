"""What happens to a product's input before codes see it."""

from __future__ import annotations

import torch
from torch import Tensor

from splitserve.quant.linear_protocol import Linear
from splitserve.quant.matrix import FP8_MAX


class TransformedInput:
    """A product of `x / smoothing` with its columns in another order."""

    def __init__(self, product: Linear, smoothing: Tensor | None, order: Tensor | None) -> None:
        """`smoothing` and `order` are (columns,); the order applies after the smoothing."""
        self._product = product
        self._factor = None if smoothing is None else smoothing.float().reciprocal()
        self._order = order

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (rows, out), the type of `x`."""
        if self._factor is not None:
            x = (x * self._factor).to(x.dtype)
        if self._order is not None:
            x = x.index_select(1, self._order)
        return self._product(x)


class RoundedInput:
    """A product of `x` rounded to int8 or e4m3, where the product itself takes wide numbers.

    The result is what a product of codes gives, without its speed.
    """

    def __init__(self, product: Linear, *, fp8: bool, scale: float | None) -> None:
        """`scale` is a fixed step of the codes; without one, each row has its own."""
        self._product = product
        self._fp8 = fp8
        self._scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (rows, out), the type of `x`."""
        most = FP8_MAX if self._fp8 else 127.0
        wide = x.float()
        scale = input_steps(wide, most, self._scale)
        codes = (wide / scale).clamp_(-most, most)
        codes = codes.to(torch.float8_e4m3fn).float() if self._fp8 else codes.round_()
        return self._product((codes * scale).to(x.dtype))


def input_steps(x: Tensor, most: float, fixed: float | None) -> Tensor:
    """Steps, (rows, 1) fp32: `row_scales`, or `fixed` for each row.

    NaN for a row with a NaN, which integer codes could not say.
    """
    if fixed is None:
        return row_scales(x, most)
    steps = x.new_full((x.shape[0], 1), fixed, dtype=torch.float32)
    return steps.masked_fill_(x.isnan().any(dim=1, keepdim=True), float("nan"))


def row_scales(x: Tensor, most: float) -> Tensor:
    """The step, (rows, 1) fp32, that puts each row's largest magnitude at `most`; 1 for zeros."""
    peak = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    steps: Tensor = (peak / most).masked_fill_(peak == 0, 1.0)
    return steps
