"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitserve.models.rope import RopeConfig


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of a step's rows, each (rows, 1, dims).

    A pair (a, b) becomes (a cos - b sin, b cos + a sin). `sin` has the first one's sign already,
    so that turning is one product and one sum with the pairs' members swapped.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


class Rotary:
    """Turns queries and keys by their positions. One for each rope that a model has."""

    def __init__(
        self, config: RopeConfig, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._inverse = torch.from_numpy(config.inverse_frequencies(context)).to(device)
        self._factor = config.attention_factor
        self._dims = config.dims
        self._interleaved = config.interleaved
        self._dtype = dtype

    def rotation(self, positions: Tensor) -> Rotation:
        """For (rows,) positions; the angles in fp32."""
        angles = positions[:, None].float() * self._inverse
        cos, sin = angles.cos(), angles.sin()
        if self._interleaved:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        cos, sin = cos[:, None].to(self._dtype), sin[:, None].to(self._dtype)
        return Rotation(cos, sin, self._interleaved)

    def turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(rows, heads, head_dim), of which the first `dims` dimensions are turned."""
        if self._dims == x.shape[-1]:
            return self._turn(x, rotation)
        turned, kept = x[..., : self._dims], x[..., self._dims :]
        return torch.cat((self._turn(turned, rotation), kept), dim=-1)

    def _turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        if self._interleaved:
            swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # type: ignore[no-untyped-call]
        else:
            swapped = x.roll(self._dims // 2, dims=-1)
        return torch.addcmul(x * rotation.cos, swapped, rotation.sin)
