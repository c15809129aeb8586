"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitserve.models.rope import RopeConfig


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of a step's rows, each (rows, 1, dims)."""

    cos: Tensor
    sin: Tensor


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
        if self._interleaved:
            angles = angles.repeat_interleave(2, dim=-1)[:, None]
        else:
            angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        return Rotation(cos.to(self._dtype), sin.to(self._dtype))

    def turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(rows, heads, head_dim), of which the first `dims` dimensions are turned."""
        if self._dims == x.shape[-1]:
            return self._turn(x, rotation)
        turned, kept = x[..., : self._dims], x[..., self._dims :]
        return torch.cat((self._turn(turned, rotation), kept), dim=-1)

    def _turn(self, x: Tensor, rotation: Rotation) -> Tensor:
        if self._interleaved:
            first, second = x[..., ::2], x[..., 1::2]
            across = torch.stack((-second, first), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            across = torch.cat((-second, first), dim=-1)
        return x * rotation.cos + across * rotation.sin
