"""Norms over rows or heads, with the residual's sum before and codes after in the same launch.

Rounding follows the layers' (`splitserve.models.layers.norm`): a plain RMS norm rounds the
normalised value to the input's type before the weight meets it, the wide one multiplies an fp32
weight first; a layer norm rounds once, at the end. A row is held in registers and read once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.fp8_rows import (
    MOST_TILE,
    check_rows,
    empty_codes,
    quantize_rows_fp8_reference,
    row_peak,
    row_step,
    row_tile,
    row_warps,
    to_codes,
)

NormKind: TypeAlias = Literal["rms", "layer"]


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + delta in the type of `x`, and its norm: both (rows, width), the type of `x`.

    x, delta: (rows, width), a 16-bit type or fp32, contiguous in the last dimension; without
        `delta` the sum is `x` itself, not a copy
    weight, bias: (width,), contiguous; only a layer norm may go without a weight, and only a
        layer norm has a bias
    wide_weight: multiply before rounding, by an fp32 weight
    out: where the norm goes, contiguous in the last dimension; it may be `x` or `delta`

    Raises `ValueError` for shapes and types that do not go together.
    """
    _check(x, delta, weight, bias, kind, x.shape[1:])
    rows, width = x.shape
    if out is None:
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty((rows, width), dtype=x.dtype, device=x.device)
    tile = row_tile(width)
    early = launches_early(x.device)
    _add_norm[(rows,)](
        x,
        delta,
        weight,
        bias,
        total,
        out,
        None,
        eps,
        None,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        out.stride(0),
        WIDTH=width,
        LAYER=kind == "layer",
        WIDE=wide_weight,
        TILE=tile,
        num_warps=row_warps(tile),
        EARLY=early,
        launch_pdl=early,
    )
    return total, out


def add_norm_fp8(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
    step: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `add_norm`, then its norm as codes, (rows, width) e4m3, and steps, (rows, 1)
    fp32. See `fp8_rows`; `step` is one for all rows, in place of each row's own.
    """
    _check(x, delta, weight, bias, kind, x.shape[1:])
    rows, width = x.shape
    codes, steps = empty_codes(rows, width, x.device)
    total = x if delta is None else torch.empty((rows, width), dtype=x.dtype, device=x.device)
    tile = row_tile(width)
    early = launches_early(x.device)
    _add_norm[(rows,)](
        x,
        delta,
        weight,
        bias,
        total,
        codes,
        steps,
        eps,
        step,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        width,
        WIDTH=width,
        LAYER=kind == "layer",
        WIDE=wide_weight,
        TILE=tile,
        num_warps=row_warps(tile),
        EARLY=early,
        launch_pdl=early,
    )
    return total, codes, steps


def heads_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Each head's norm, into `out` or in place: (rows, heads, head_dim), the type of `x`.

    x, out: views of any row and head stride, contiguous in the last dimension
    weight, bias: (head_dim,) for all heads or (heads, head_dim), contiguous

    Raises `ValueError` for shapes and types that do not go together.
    """
    rows, heads, head_dim = x.shape
    if x.stride(2) != 1 or (out is not None and (out.shape != x.shape or out.stride(2) != 1)):
        raise ValueError("heads must be contiguous, and the result of the input's shape")
    _check(x, None, weight, bias, kind, x.shape[weight.ndim * -1 :])
    out = x if out is None else out
    tile_dim = int(triton.next_power_of_2(head_dim))
    tile_heads = max(1, min(2048 // tile_dim, int(triton.next_power_of_2(heads))))
    _heads_norm[(rows, triton.cdiv(heads, tile_heads))](
        x,
        weight,
        bias,
        out,
        eps,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        HEADS=heads,
        HEAD_DIM=head_dim,
        LAYER=kind == "layer",
        WIDE=wide_weight,
        BY_HEAD=weight.ndim == 2,
        TILE_HEADS=tile_heads,
        TILE_DIM=tile_dim,
        num_warps=min(4, max(1, tile_heads * tile_dim // 256)),
    )
    return out


def add_norm_reference(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
) -> tuple[Tensor, Tensor]:
    """`add_norm` in plain torch."""
    total = x if delta is None else x + delta
    return total, _norm_reference(total, weight, bias, eps, kind, wide_weight)


def add_norm_fp8_reference(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
    step: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_norm_fp8` in plain torch."""
    total = x if delta is None else x + delta
    normed = _norm_reference(total, weight, bias, eps, kind, wide_weight)
    return (total, *quantize_rows_fp8_reference(normed, step=step))


def heads_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kind: NormKind,
    wide_weight: bool,
) -> Tensor:
    """`heads_norm` in plain torch, not in place."""
    return _norm_reference(x, weight, bias, eps, kind, wide_weight)


def _norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: NormKind,
    wide_weight: bool,
) -> Tensor:
    wide = x.float()
    if kind == "layer":
        normed = functional.layer_norm(wide, x.shape[-1:], eps=eps)
        normed = normed if weight is None else normed * weight.float()
        return (normed if bias is None else normed + bias.float()).to(x.dtype)
    assert weight is not None
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype) if wide_weight else normed.to(x.dtype) * weight


def _check(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    shape: torch.Size,
) -> None:
    check_rows(x if x.ndim == 2 else x[:, 0])
    if x.shape[-1] > MOST_TILE:
        raise ValueError(f"width {x.shape[-1]} is above {MOST_TILE}")
    if delta is not None and (
        delta.shape != x.shape or delta.dtype != x.dtype or delta.stride(-1) != 1
    ):
        raise ValueError(f"delta {tuple(delta.shape)} is not like x {tuple(x.shape)}")
    if any(t is not None and (t.shape != shape or not t.is_contiguous()) for t in (weight, bias)):
        raise ValueError(f"weight and bias must be contiguous and of shape {tuple(shape)}")
    if kind == "rms" and (weight is None or bias is not None):
        raise ValueError("an RMS norm has a weight and no bias")


@triton.jit
def _scale_rms(
    wide: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    dtype: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """The end of an RMS norm: the normalised value times the weight, rounded to `dtype`."""
    normed = wide * scale
    if not WIDE:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * weight.to(tl.float32)).to(dtype)


@triton.jit
def norm_row(
    wide: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: tl.tensor,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYER: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The norm of one row of fp32, zeros beyond its width, rounded to `dtype`. Weight and bias may
    be None.
    """
    columns = tl.arange(0, TILE)
    inside = columns < WIDTH
    if LAYER:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    if LAYER:
        normed = wide * scale
        if weight is not None:
            normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            normed += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        normed = normed.to(dtype)
    else:
        factors = tl.load(weight + columns, mask=inside, other=0.0)
        normed = _scale_rms(wide, scale, factors, dtype, WIDE)
    return normed


@triton.jit
def _add_norm(
    # pointers; delta, weight, bias and steps may be None
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    steps: tl.tensor,
    # numbers
    eps: tl.tensor,
    fixed: tl.tensor,
    # strides, in elements
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    out_stride: tl.tensor,
    # constants
    WIDTH: tl.constexpr,
    LAYER: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One row: sum, norm, and codes where there are steps."""
    if EARLY:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        more = tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0)
        rounded = (wide + more.to(tl.float32)).to(dtype)
        tl.store(total + row * WIDTH + columns, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    normed = norm_row(wide, weight, bias, eps, dtype, WIDTH, LAYER, WIDE, TILE)
    if steps is not None:
        normed = tl.where(inside, normed.to(tl.float32), 0.0)
        step = row_step(row_peak(normed), fixed)
        tl.store(steps + row, step)
        tl.store(out + row * out_stride + columns, to_codes(normed, step), mask=inside)
    else:
        tl.store(out + row * out_stride + columns, normed, mask=inside)


@triton.jit
def _heads_norm(
    # pointers; bias may be None
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    # numbers
    eps: tl.tensor,
    # strides, in elements
    x_stride: tl.tensor,
    x_head_stride: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    # constants
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LAYER: tl.constexpr,
    WIDE: tl.constexpr,
    BY_HEAD: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
) -> None:
    """Some heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    dims = tl.arange(0, TILE_DIM)[None, :]
    inside = (heads < HEADS) & (dims < HEAD_DIM)
    dtype: tl.constexpr = x.dtype.element_ty
    places = row * x_stride + heads * x_head_stride + dims
    wide = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if LAYER:
        wide = tl.where(inside, wide - tl.sum(wide, 1)[:, None] / HEAD_DIM, 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + eps)[:, None]
    factor_places = dims + (heads * HEAD_DIM if BY_HEAD else 0)
    factor_mask = inside if BY_HEAD else dims < HEAD_DIM
    factors = tl.load(weight + factor_places, mask=factor_mask, other=0.0)
    if LAYER:
        normed = wide * scale * factors.to(tl.float32)
        if bias is not None:
            normed += tl.load(bias + factor_places, mask=factor_mask, other=0.0).to(tl.float32)
        normed = normed.to(dtype)
    else:
        normed = _scale_rms(wide, scale, factors, dtype, WIDE)
    places = row * out_stride + heads * out_head_stride + dims
    tl.store(out + places, normed, mask=inside)
