"""x @ weight^T of e4m3 codes on both sides, for at most 64 rows, at the speed of reading codes.

See `small_tiles` for the algorithm. Each row of x and each row of the weight has one fp32 step, so
that scaling waits for the end of the sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from splitserve_kernels.small_linear import LONG_ROW, gate_reference, small_linear_reference
from splitserve_kernels.small_multiply import Activation, multiply
from splitserve_kernels.small_tiles import MAX_ROWS, TilePlan, fill, num_processors, pad_rows

CODES = torch.float8_e4m3fn
PRECISE_K = 128
"""Columns after which fp8 sums go on in fp32."""


def small_linear_fp8(
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """(codes * steps) @ (weight * scales)^T + bias, rounded once: (m, n).

    codes: (m, k) e4m3, m <= MAX_ROWS, contiguous in the last dimension
    steps: (m,) or (m, 1) fp32, contiguous
    weight: (n, k) e4m3, contiguous; k a multiple of 16
    scales: (n,) or (n, 1) fp32, contiguous
    bias: (n,) of the output's type
    out: (m, n), contiguous in the last dimension; made of `out_dtype` if None
    plan, early: see `small_linear`

    Raises `ValueError` for shapes and types that do not go together.
    """
    out = _checked_out(codes, steps, weight, scales, out, weight.shape[0], out_dtype)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != out.dtype):
        raise ValueError(f"bias {tuple(bias.shape)} does not go with {tuple(weight.shape)}")
    plan = plan or _plan(codes, weight, gated=False)
    multiply(
        codes,
        weight,
        out,
        plan,
        bias=bias,
        steps=steps,
        scales=scales,
        early=early,
    )
    return out


def small_gated_linear_fp8(
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scales: Tensor,
    activation: Activation,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    plan: TilePlan | None = None,
    early: bool = True,
) -> Tensor:
    """`small_gated_linear` of codes: weight (2 n, k) and scales (2 n,), the gate's rows first.

    Raises `ValueError` for shapes, types and activations that do not go together.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation {activation!r} is not one of {get_args(Activation)}")
    if weight.shape[0] % 2:
        raise ValueError(f"a weight of {weight.shape[0]} rows has no half for the gate")
    out = _checked_out(codes, steps, weight, scales, out, weight.shape[0] // 2, out_dtype)
    plan = plan or _plan(codes, weight, gated=True)
    multiply(codes, weight, out, plan, steps=steps, scales=scales, gate=activation, early=early)
    return out


def small_linear_fp8_reference(
    codes: Tensor, steps: Tensor, weight: Tensor, scales: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """`small_linear_fp8` in fp32."""
    wide = weight.float() * scales.reshape(-1, 1)
    return small_linear_reference(codes.float() * steps.reshape(-1, 1), wide, bias=bias)


def small_gated_linear_fp8_reference(
    codes: Tensor, steps: Tensor, weight: Tensor, scales: Tensor, activation: Activation
) -> Tensor:
    """`small_gated_linear_fp8` in fp32."""
    return gate_reference(small_linear_fp8_reference(codes, steps, weight, scales), activation)


def choose_fp8(
    m: int, n: int, k: int, *, num_processors: int, gated: bool = False
) -> TilePlan | None:
    """The plan for codes (m, k) and weight (n, k), or None where the library is faster."""
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
    return replace(plan, prefetch_lines=4, precise_k=PRECISE_K)


def _plan(codes: Tensor, weight: Tensor, *, gated: bool) -> TilePlan:
    m, (n, k) = codes.shape[0], weight.shape
    processors = num_processors(codes.device)
    chosen = choose_fp8(m, n, k, num_processors=processors, gated=gated)
    return chosen or TilePlan(pad_rows(m, 16), 64, 128, num_stages=3, precise_k=PRECISE_K)


def _checked_out(
    codes: Tensor,
    steps: Tensor,
    weight: Tensor,
    scales: Tensor,
    out: Tensor | None,
    columns: int,
    out_dtype: torch.dtype,
) -> Tensor:
    if codes.dim() != 2 or weight.dim() != 2 or codes.shape[1] != weight.shape[1]:
        raise ValueError(
            f"codes {tuple(codes.shape)} and weight {tuple(weight.shape)} do not go together"
        )
    m, k = codes.shape
    if not 1 <= m <= MAX_ROWS or k % 16:
        raise ValueError(f"codes are ({m}, {k}), must be 1 to {MAX_ROWS} rows of 16s")
    if codes.dtype is not CODES or weight.dtype is not CODES:
        raise ValueError(f"types {codes.dtype} and {weight.dtype} are not supported")
    if codes.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("weight and the last dimension of codes must be contiguous")
    for name, each, rows in (("steps", steps, m), ("scales", scales, weight.shape[0])):
        fits = each.numel() == rows and each.dtype is torch.float32 and each.is_contiguous()
        if not fits:
            raise ValueError(f"{name} {tuple(each.shape)} of {each.dtype} are not {rows} fp32")
    if out is None:
        return torch.empty((m, columns), dtype=out_dtype, device=codes.device)
    if out.shape != (m, columns) or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} is not ({m}, {columns})")
    return out
