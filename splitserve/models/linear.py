"""Matrix products, chosen when an engine starts.

A `Linear` owns one weight in whatever form its kernel likes best. Which kind is used is decided
once by `choose_linear`; layers only call it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.quant.code_memory import has_onednn
from splitserve.quant.linear import make_quantized_linear
from splitserve.quant.linear_protocol import Linear as Linear
from splitserve.quant.matrix import QuantizedMatrix, Weight

TILE_ROWS = 16


MakeDense: TypeAlias = Callable[[Tensor, Tensor | None], Linear]
MakeLinear: TypeAlias = Callable[[Weight, Tensor | None], Linear]
"""`make(weight, bias)`."""


class PlainLinear:
    """The weight as it is, by the library's own choice of kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return functional.linear(x, self._weight, self._bias)


class PackedLinear:
    """The weight in oneDNN's blocked layout, packed once instead of read with strides each time.

    Measured on two cores with AVX512-BF16 for the shapes of a 135M model: 1.9 x at one row,
    1.5 x at 16, 1.04 x at 512.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


class TiledLinear:
    """Another product, always of `TILE_ROWS` rows at once, the last tile padded.

    A library may round differently for another number of rows. With a fixed number a row's
    result depends on that row alone: this is what deterministic mode rests on. Each tile is
    copied to memory of its own, since alignment may choose the library's kernel, too.
    """

    def __init__(self, product: Linear) -> None:
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        outs = []
        for start in range(0, x.shape[0], TILE_ROWS):
            part = x[start : start + TILE_ROWS]
            tile = x.new_zeros(TILE_ROWS, x.shape[1])
            tile[: part.shape[0]] = part
            outs.append(self._product(tile)[: part.shape[0]])
        return torch.cat(outs)


class ConcatLinear:
    """Products of one input side by side, for weights that cannot be stacked."""

    def __init__(self, products: Sequence[Linear]) -> None:
        self._products = products

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        return torch.cat([product(x) for product in self._products], dim=-1)


@dataclass(frozen=True)
class Products:
    """How weights of each role are multiplied; see `load.Products`."""

    projection: MakeLinear
    unembedding: MakeLinear
    exact: MakeLinear


def choose_products(dtype: torch.dtype, device: torch.device, *, deterministic: bool) -> Products:
    """The fastest products for the type and device, tiled in deterministic mode."""
    packed = device.type == "cpu" and has_onednn() and dtype is torch.bfloat16
    # fp32 is asked for to compare numbers, not for speed or memory: codes are widened once.
    exact = dtype is torch.float32
    make_dense: MakeDense = PackedLinear if packed else PlainLinear
    if device.type == "cuda" and not deterministic:
        # Only machines with a GPU need triton.
        from splitserve.models.triton_linear import TritonLinear

        make_dense = TritonLinear

    def make(weight: Weight, bias: Tensor | None) -> Linear:
        product: Linear
        if isinstance(weight, QuantizedMatrix) and exact and not weight.quantizes_input:
            weight = weight.dequantize(dtype)
        if isinstance(weight, Tensor):
            product = make_dense(weight, bias)
        else:
            product = make_quantized_linear(weight, bias, dtype, device)
        return TiledLinear(product) if deterministic else product

    return Products(projection=make, unembedding=make, exact=make)
