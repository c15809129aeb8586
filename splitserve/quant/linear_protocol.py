"""What a product of any kind looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

from torch import Tensor


class Linear(Protocol):
    """`x @ weight.T + bias` for (rows, in) inputs and a weight of shape (out, in)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (rows, out), the type of `x`."""
        ...


@dataclass(frozen=True)
class CodedRows:
    """Rows in 8 bits, as `codes * steps`, where what made them has rounded them already."""

    codes: Tensor
    """(rows, width) float8_e4m3fn."""
    steps: Tensor
    """(rows, 1) fp32."""


Rows: TypeAlias = Tensor | CodedRows


def rows_of(x: Rows, numbers: Tensor) -> Rows:
    """The rows with these (n,) numbers."""
    if isinstance(x, CodedRows):
        return CodedRows(x.codes[numbers], x.steps[numbers])
    return x[numbers]


class CodesLinear(Linear, Protocol):
    """A product that multiplies codes, and rounds its input to them if it gets it whole."""

    def of_codes(self, x: CodedRows) -> Tensor:
        """Shape (rows, out), the model's type."""
        ...


def multiply(linear: Linear, x: Rows) -> Tensor:
    """Either kind of rows. Codes are only made for a product that takes them."""
    if isinstance(x, CodedRows):
        return cast(CodesLinear, linear).of_codes(x)
    return linear(x)
