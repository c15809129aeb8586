"""Matrix products, chosen when an engine starts.

A library's product may round differently for another number of rows. `fast_linear` takes that
for speed. `tiled_linear` always multiplies `TILE_ROWS` rows at once, padding the last tile, so
that a row's result depends on that row alone: this is what deterministic mode rests on.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

TILE_ROWS = 16


class Linear(Protocol):
    """`x @ weight.T + bias` for x of shape (rows, in) and weight of shape (out, in)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Shape (rows, out)."""
        ...


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One product over all rows."""
    return functional.linear(x, weight, bias)


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product tile by tile. Each tile is copied to memory of its own, since alignment
    may choose the library's kernel, too.
    """
    rows = x.shape[0]
    out = x.new_empty(rows, weight.shape[0])
    for start in range(0, rows, TILE_ROWS):
        part = x[start : start + TILE_ROWS]
        tile = x.new_zeros(TILE_ROWS, x.shape[1])
        tile[: part.shape[0]] = part
        out[start : start + TILE_ROWS] = functional.linear(tile, weight, bias)[: part.shape[0]]
    return out


def choose_linear(*, deterministic: bool) -> Linear:
    """The product for an engine's mode."""
    return tiled_linear if deterministic else fast_linear


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for (rows, 2 * width) with the gate first. Shape (rows, width)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, the mean in fp32 (Zhang & Sennrich 2019)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
