"""x @ weight^T of e4m3 codes on both sides, for at most 64 rows, at the speed of reading codes.

See `small_tiles` for the algorithm. Each row of the weight has one fp32 step, and so has a row of x
that comes as codes: scaling waits for the end of the sum. x may also come in 16 bits. Then every
block of a row, as many columns as the plan's `block_k`, becomes codes in the registers of each
program that reads it, with a step of its own, by which the block's sum is scaled as it is added in
fp32. That saves a launch before the product and costs each program twice the bytes of x.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from splitserve_kernels.small_linear import LONG_ROW, gate_reference, small_linear_reference
from splitserve_kernels.small_multiply import Activation, multiply
from splitserve_kernels.small_multiply_blocks import multiply_blocks
from splitserve_kernels.small_tiles import (
    MAX_ROWS,
    TOLERANCE,
    TilePlan,
    fill,
    num_processors,
    pad_rows,
    round_blocks_reference,
)

CODES = torch.float8_e4m3fn
PRECISE_K = 128
"""Columns after which fp8 sums go on in fp32."""


def small_linear_fp8(
    x: Tensor,
    steps: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """(x * steps) @ (weight * scales)^T + bias, rounded once: (m, n).

    x: (m, k) e4m3 codes, m <= MAX_ROWS, contiguous in the last dimension; rows of 16 bits or fp32,
        which become codes in blocks, where `steps` is None
    steps: (m,) or (m, 1) fp32, contiguous
    weight: (n, k) e4m3, contiguous; k a multiple of 16
    scales: (n,) or (n, 1) fp32, contiguous
    bias: (n,) of the output's type
    out: (m, n), contiguous in the last dimension; made of `out_dtype` if None
    plan, early: see `small_linear`; the result depends on the plan's `block_k` if `steps` is None

    A block with an infinity or a NaN makes its row of the result NaN. Raises `ValueError` for
    shapes, types and plans that do not go together.
    """
    out = _checked_out(x, steps, weight, scales, out, weight.shape[0], out_dtype)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != out.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} does not go with {tuple(weight.shape)}")
    plan = plan or _plan(x, weight, gated=False)
    if steps is None:
        multiply_blocks(x, weight, scales, out, plan, bias=bias, early=early)
    else:
        multiply(x, weight, out, plan, bias=bias, steps=steps, scales=scales, early=early)
    return out


def small_gated_linear_fp8(
    x: Tensor,
    steps: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    activation: Activation,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """`small_gated_linear` of what `small_linear_fp8` takes: weight (2 n, k) and scales (2 n,), the
    gate's rows first.

    Raises `ValueError` for shapes, types, plans and activations that do not go together.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation {activation!r} is not one of {get_args(Activation)}")
    if weight.shape[0] % 2:
        raise ValueError(f"a weight of {weight.shape[0]} rows has no half for the gate")
    out = _checked_out(x, steps, weight, scales, out, weight.shape[0] // 2, out_dtype)
    plan = plan or _plan(x, weight, gated=True)
    if steps is None:
        multiply_blocks(x, weight, scales, out, plan, gate=activation, early=early)
    else:
        multiply(x, weight, out, plan, steps=steps, scales=scales, gate=activation, early=early)
    return out


def small_linear_fp8_reference(
    x: Tensor,
    steps: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
    block_k: int = PRECISE_K,
) -> Tensor:
    """`small_linear_fp8` in fp32; `block_k` is the plan's, for x that is not codes."""
    wide = weight.float() * scales.reshape(-1, 1)
    if steps is None:
        rows = round_blocks_reference(x, block_k, weight.dtype)
    else:
        rows = x.float() * steps.reshape(-1, 1)
    return small_linear_reference(rows, wide, bias=bias)


def small_gated_linear_fp8_reference(
    x: Tensor,
    steps: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    activation: Activation,
    *,
    block_k: int = PRECISE_K,
) -> Tensor:
    """`small_gated_linear_fp8` in fp32."""
    both = small_linear_fp8_reference(x, steps, weight, scales, block_k=block_k)
    return gate_reference(both, activation)


def choose_fp8(
    m: int, n: int, k: int, *, num_processors: int, gated: bool = False, coded: bool = True
) -> TilePlan | None:
    """The plan for x (m, k), which is `coded` or in 16 bits, and weight (n, k); None where the
    library is faster.
    """
    if not 1 <= m <= MAX_ROWS or k % 256 or n % 128 or n * k < 1 << 22:
        return None
    side = pad_rows(m, 16)
    tiles = n // (128 if gated else 64)
    if m > 32 and tiles > 8 * num_processors:
        return None
    splits = fill(tiles, k // 1024, num_processors, least=0.7)
    if side == 16 and k > LONG_ROW:
        splits = fill(tiles, k // 1024, num_processors, least=1.4)
    alone = tiles * splits <= num_processors and not gated
    if side == 16 or (side == 32 and alone):
        plan = TilePlan(side, 64, 256, splits, num_stages=6 if alone else 3 if gated else 4)
    else:
        plan = TilePlan(side, 64, 128, splits, num_stages=8 if alone else 7)
    plan = replace(plan, prefetch_lines=4, precise_k=PRECISE_K)
    return plan if coded else plan.with_rows_of_16_bits(gated=gated, alone=alone)


def _plan(x: Tensor, weight: Tensor, *, gated: bool) -> TilePlan:
    m, (n, k) = x.shape[0], weight.shape
    processors, coded = num_processors(x.device), x.dtype is CODES
    chosen = choose_fp8(m, n, k, num_processors=processors, gated=gated, coded=coded)
    return chosen or TilePlan(pad_rows(m, 16), 64, 128, num_stages=3, precise_k=PRECISE_K)


def _checked_out(
    x: Tensor,
    steps: Tensor | None,
    weight: Tensor,
    scales: Tensor,
    out: Tensor | None,
    columns: int,
    out_dtype: torch.dtype,
) -> Tensor:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not go together")
    m, k = x.shape
    if not 1 <= m <= MAX_ROWS or k % 16:
        raise ValueError(f"x is ({m}, {k}), must be 1 to {MAX_ROWS} rows of 16s")
    coded = x.dtype is CODES if steps is not None else x.dtype in TOLERANCE
    if not coded or weight.dtype is not CODES:
        raise ValueError(f"types {x.dtype} and {weight.dtype} are not supported")
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("weight and the last dimension of x must be contiguous")
    for name, each, rows in (("steps", steps, m), ("scales", scales, weight.shape[0])):
        if each is None:
            continue
        fits = each.numel() == rows and each.dtype is torch.float32 and each.is_contiguous()
        if not fits:
            raise ValueError(f"{name} {tuple(each.shape)} of {each.dtype} are not {rows} fp32")
    if out is None:
        return torch.empty((m, columns), dtype=out_dtype, device=x.device)
    if out.shape != (m, columns) or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not ({m}, {columns})")
    return out
