"""x @ weight^T for at most 64 rows of x, at the speed of reading the weight.

See `small_tiles` for the algorithm. `small_gated_linear` is the first half of a gated MLP,
activation(x @ gate^T) * (x @ up^T), from one weight with the gate's rows on top. `choose` says
where these beat the library's products; the tables in it are measured (`benchmarks/kernels`).
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from splitserve_kernels.small_multiply import Activation, multiply
from splitserve_kernels.small_tiles import (
    MAX_ROWS,
    TOLERANCE,
    TilePlan,
    fill,
    num_processors,
    pad_rows,
)

LEAST_WEIGHTS = 1 << 22
"""The smallest weight that is worth it."""

LONG_ROW = 8192
"""Columns above which more splits pay in spite of their sums."""


def small_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """x @ weight^T + bias, summed in fp32 and rounded once: (m, n).

    x: (m, k), m <= MAX_ROWS, contiguous in the last dimension
    weight: (n, k) of the same type, contiguous
    bias: (n,) of the same type
    out: (m, n) of the same type, contiguous in the last dimension; made if None
    plan: how to cut the product; measured choice, or a fair guess, if None
    early: use programmatic dependent launch where the device has it

    Raises `ValueError` for shapes and types that do not go together.
    """
    out = _checked_out(x, weight, bias, out, weight.shape[0] if weight.dim() == 2 else 0)
    plan = plan or _plan(x, weight, gated=False)
    multiply(x, weight, out, plan, bias=bias, early=early)
    return out


def small_gated_linear(
    x: Tensor,
    weight: Tensor,
    activation: Activation,
    *,
    out: Tensor | None = None,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """activation(x @ weight[:n]^T) * (x @ weight[n:]^T), in fp32 and rounded once: (m, n).

    weight: (2 n, k), the gate's rows first; the rest as in `small_linear`
    activation: silu, gelu (exact) or gelu_tanh

    Raises `ValueError` for shapes, types and activations that do not go together.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation {activation!r} is not one of {get_args(Activation)}")
    if weight.shape[0] % 2:
        raise ValueError(f"a weight of {weight.shape[0]} rows has no half for the gate")
    out = _checked_out(x, weight, None, out, weight.shape[0] // 2)
    plan = plan or _plan(x, weight, gated=True)
    multiply(x, weight, out, plan, gate=activation, early=early)
    return out


def small_linear_reference(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`small_linear` in fp32."""
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def small_gated_linear_reference(x: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    """`small_gated_linear` in fp32."""
    return gate_reference(small_linear_reference(x, weight), activation)


def gate_reference(product: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up of a product (m, 2 n) with the gate's columns first."""
    gate, up = product.chunk(2, dim=1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def choose(
    m: int, n: int, k: int, dtype: torch.dtype, *, num_processors: int, gated: bool = False
) -> TilePlan | None:
    """The plan for x (m, k) and weight (n, k), or None where the library is faster."""
    if dtype not in (torch.bfloat16, torch.float16) or not 1 <= m <= MAX_ROWS:
        return None
    if k % 128 or n % 128 or n * k < LEAST_WEIGHTS:
        return None
    if not gated and n * k <= (0 if m <= 16 else 1 << 24 if m <= 32 else 1 << 25):
        return None
    return _cut(m, n, k, num_processors=num_processors, gated=gated)


def _plan(x: Tensor, weight: Tensor, *, gated: bool) -> TilePlan:
    """`choose`, or what computes any shape."""
    m, (n, k) = x.shape[0], weight.shape
    processors = num_processors(x.device)
    chosen = choose(m, n, k, x.dtype, num_processors=processors, gated=gated)
    if chosen is not None:
        return chosen
    if x.dtype is not torch.float32 and k % 128 == 0 and n % 128 == 0:
        return _cut(m, n, k, num_processors=processors, gated=gated)
    block_k = 32 if x.dtype is torch.float32 else 64
    return TilePlan(pad_rows(m), 64, block_k, num_stages=3)


def _cut(m: int, n: int, k: int, *, num_processors: int, gated: bool) -> TilePlan:
    """Tiles of 64 rows: one program a processor with most of its memory in flight, or two.

    More rows of x cost more to read and to add up, so that they want fewer splits.
    """
    side = pad_rows(m, 16)
    tiles = n // (128 if gated else 64)
    splits = fill(tiles, k // 512, num_processors, least=0.7)
    alone = tiles * splits <= num_processors and not gated
    if alone and k % 256 == 0 and (splits == 1 or (side == 16 and k <= LONG_ROW)):
        return TilePlan(side, 64, 256, splits, num_stages=3, prefetch_lines=4)
    if side == 16:
        splits = fill(tiles, k // 512, num_processors, least=1.4)
        return TilePlan(side, 64, 128, splits, num_stages=4, prefetch_lines=4)
    stages = 6 if alone else 4 if side < 64 or gated else 3
    return TilePlan(side, 64, 128, splits, num_stages=stages, prefetch_lines=4)


def _checked_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, columns: int
) -> Tensor:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not go together")
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {x.shape[0]} rows, must have 1 to {MAX_ROWS}")
    if x.dtype != weight.dtype or x.dtype not in TOLERANCE:
        raise ValueError(f"types {x.dtype} and {weight.dtype} are not supported")
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("weight and the last dimension of x must be contiguous")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} does not go with {tuple(weight.shape)}")
    if out is None:
        return x.new_empty((x.shape[0], columns))
    if out.shape != (x.shape[0], columns) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not ({x.shape[0]}, {columns}) of {x.dtype}")
    return out
