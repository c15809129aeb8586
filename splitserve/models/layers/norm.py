"""Norms over the last dimension."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.models.config import NormConfig
from splitserve.parallel.group import Group
from splitserve.quant.linear_protocol import Rows


class Norm(Protocol):
    """Shape and type of the result are those of `x`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        ...

    def read(
        self, x: Tensor, delta: Tensor | None, group: Group | None = None
    ) -> tuple[Tensor, Rows]:
        """The residual stream's `x + delta`, and that normalised for the products that read it,
        which may take it as codes. With a group, `delta` is each rank's part of a sum; it may be
        overwritten.
        """
        ...


class PlainNorm(ABC):
    """A norm that adds and normalises one after the other."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""

    def read(
        self, x: Tensor, delta: Tensor | None, group: Group | None = None
    ) -> tuple[Tensor, Rows]:
        """See `Norm.read`."""
        if delta is not None:
            x = x + (delta if group is None else group.all_reduce(delta))
        return x, self(x)


class RmsNorm(PlainNorm):
    """x / rms(x) * weight (Zhang & Sennrich 2019), the mean in fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return (wide * scale).to(x.dtype) * self._weight


class WideRmsNorm(PlainNorm):
    """The same with an fp32 weight that is multiplied before rounding, as Gemma's."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight.float()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return (wide * scale * self._weight).to(x.dtype)


class SplitRmsNorm(PlainNorm):
    """RMS norm of a row of which each rank has `x.shape[-1]` of `width` columns, with an fp32
    weight that is multiplied before rounding.
    """

    def __init__(self, weight: Tensor, eps: float, width: int, group: Group) -> None:
        self._weight = weight.float()
        self._eps = eps
        self._width = width
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        wide = x.float()
        total = self._group.all_reduce(wide.square().sum(-1, keepdim=True))
        scale = torch.rsqrt(total / self._width + self._eps)
        return (wide * scale * self._weight).to(x.dtype)


class LayerNorm(PlainNorm):
    """(x - mean) / deviation * weight + bias (Ba et al. 2016), where there are these."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        return functional.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._eps)


class WideLayerNorm(PlainNorm):
    """Layer norm with an fp32 weight of any shape that fits, as Cohere's over heads."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._weight = weight.float()
        self._bias = None if bias is None else bias.float()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self._eps) * self._weight
        if self._bias is not None:
            normed = normed + self._bias
        return normed.to(x.dtype)


def make_norm(config: NormConfig, weight: Tensor | None, bias: Tensor | None) -> Norm:
    """The norm of a config. A weight of two dimensions is one for each head."""
    if weight is not None and config.weight_offset:
        weight = weight.float() + config.weight_offset
    if config.kind == "layer":
        if weight is not None and (config.fp32_weight or weight.ndim > 1):
            return WideLayerNorm(weight, bias, config.eps)
        return LayerNorm(weight, bias, config.eps)
    assert weight is not None
    wide = config.fp32_weight or bool(config.weight_offset)
    return WideRmsNorm(weight, config.eps) if wide else RmsNorm(weight, config.eps)
