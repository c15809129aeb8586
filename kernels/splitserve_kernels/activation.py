"""Activations of MLPs over the product of gate and up, with codes after in the same launch.

Rounding follows the layers' (`splitserve.models.layers.activation`): what torch would have put in
memory between two of its operators is rounded to the input's type here too.
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
    check_rows,
    empty_codes,
    quantize_rows_fp8_reference,
    row_peak,
    row_step,
    row_tile,
    row_warps,
    to_codes,
)

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "clamped_swiglu"]

_TILE = 1024
_QUICK = tl.constexpr(1.702)
_HALF_ROOT = tl.constexpr(0.7071067811865476)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


def activate(gate_up: Tensor, activation: Activation, *, gated: bool, limit: float = 7.0) -> Tensor:
    """(rows, size) in the type of `gate_up`.

    gate_up: a 16-bit type or fp32, contiguous in the last dimension; (rows, 2 * size) with the
        gate's columns first, or alternating for `clamped_swiglu`; (rows, size) if not `gated`
    limit: `clamped_swiglu`'s; it is always gated

    Raises `ValueError` for shapes and types that are not supported.
    """
    rows, size = _check(gate_up, activation, gated)
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    tile = min(_TILE, int(triton.next_power_of_2(size)))
    early = launches_early(gate_up.device)
    _activate[(rows, triton.cdiv(size, tile))](
        gate_up,
        out,
        float(limit),
        gate_up.stride(0),
        SIZE=size,
        ACTIVATION=activation,
        GATED=gated,
        TILE=tile,
        num_warps=max(1, tile // 256),
        EARLY=early,
        launch_pdl=early,
    )
    return out


def activate_fp8(
    gate_up: Tensor,
    activation: Activation,
    *,
    gated: bool,
    limit: float = 7.0,
    step: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result of `activate` as codes, (rows, size) e4m3, and steps, (rows, 1) fp32. See
    `fp8_rows`; `step` is one for all rows, in place of each row's own.
    """
    rows, size = _check(gate_up, activation, gated)
    codes, steps = empty_codes(rows, size, gate_up.device)
    tile = row_tile(size)
    early = launches_early(gate_up.device)
    _activate_fp8[(rows,)](
        gate_up,
        codes,
        steps,
        float(limit),
        step,
        gate_up.stride(0),
        SIZE=size,
        ACTIVATION=activation,
        GATED=gated,
        TILE=tile,
        num_warps=row_warps(tile),
        EARLY=early,
        launch_pdl=early,
    )
    return codes, steps


def activate_reference(
    gate_up: Tensor, activation: Activation, *, gated: bool, limit: float = 7.0
) -> Tensor:
    """`activate` in plain torch."""
    if activation == "clamped_swiglu":
        gate = gate_up[..., ::2].clamp(max=limit)
        up = gate_up[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    size = gate_up.shape[-1] // (1 + gated)
    gate = gate_up[..., :size]
    if activation == "quick_gelu":
        result = gate * torch.sigmoid(1.702 * gate)
    elif activation == "silu":
        result = functional.silu(gate)
    elif activation == "relu":
        result = functional.relu(gate)
    else:
        result = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return result * gate_up[..., size:] if gated else result


def activate_fp8_reference(
    gate_up: Tensor,
    activation: Activation,
    *,
    gated: bool,
    limit: float = 7.0,
    step: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`activate_fp8` in plain torch."""
    result = activate_reference(gate_up, activation, gated=gated, limit=limit)
    return quantize_rows_fp8_reference(result, step=step)


def _check(gate_up: Tensor, activation: Activation, gated: bool) -> tuple[int, int]:
    """Rows and size of the result."""
    check_rows(gate_up)
    rows, width = gate_up.shape
    if not gated and activation == "clamped_swiglu":
        raise ValueError("clamped_swiglu is always gated")
    if gated and width % 2:
        raise ValueError(f"gate and up have {width} columns together, an odd number")
    return rows, width // 2 if gated else width


@triton.jit
def _round(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return x.to(dtype).to(tl.float32)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    """Below -88 it stays at its least normal number, where the exponential would be infinite."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 88.0)))


@triton.jit
def _apply(
    row: tl.tensor,
    start: tl.tensor,
    limit: tl.tensor,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """(TILE,) results of the row from column `start` on, fp32 as rounded; zero past its end."""
    dtype: tl.constexpr = row.dtype.element_ty
    columns = start + tl.arange(0, TILE)
    inside = columns < SIZE
    if ACTIVATION == "clamped_swiglu":
        pairs = 2 * start + tl.arange(0, 2 * TILE)
        both = tl.load(row + pairs, mask=pairs < 2 * SIZE, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [TILE, 2]))
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        gate, up = _round(gate, dtype), _round(up, dtype)
        weighted = _round(_round(up + 1.0, dtype) * gate, dtype)
        share = _round(_sigmoid(_round(gate * _QUICK, dtype)), dtype)
        result = _round(weighted * share, dtype)
    else:
        x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            result = x * _sigmoid(x)
        elif ACTIVATION == "gelu":
            result = 0.5 * x * (1.0 + tl.erf(x * _HALF_ROOT))
        elif ACTIVATION == "gelu_tanh":
            # (1 + tanh u) / 2 is the sigmoid of 2u, without tanh's cancellation.
            result = x * _sigmoid((x + 0.044715 * x * x * x) * _TANH_SCALE)
        elif ACTIVATION == "quick_gelu":
            result = x * _round(_sigmoid(_round(x * _QUICK, dtype)), dtype)
        else:
            tl.static_assert(ACTIVATION == "relu")
            result = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = _round(result, dtype)
        if GATED:
            up = tl.load(row + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
            result = _round(result * up, dtype)
    return result


@triton.jit
def _activate(
    # pointers
    gate_up: tl.tensor,
    out: tl.tensor,
    # numbers
    limit: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # constants
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A tile of one row."""
    if EARLY:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    result = _apply(gate_up + row * stride, start, limit, SIZE, ACTIVATION, GATED, TILE)
    columns = start + tl.arange(0, TILE)
    place = out + row * SIZE + columns
    tl.store(place, result.to(out.dtype.element_ty), mask=columns < SIZE)


@triton.jit
def _activate_fp8(
    # pointers
    gate_up: tl.tensor,
    codes: tl.tensor,
    steps: tl.tensor,
    # numbers
    limit: tl.tensor,
    fixed: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # constants
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One row; computed twice if it is wider than the tile."""
    if EARLY:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    gate_up += row * stride
    codes += row * SIZE
    if SIZE <= TILE:
        result = _apply(gate_up, 0, limit, SIZE, ACTIVATION, GATED, TILE)
        step = row_step(row_peak(result), fixed)
        tl.store(codes + columns, to_codes(result, step), mask=columns < SIZE)
    else:
        peaks = tl.zeros([TILE], tl.float32)
        for start in range(0, SIZE, TILE):
            part = tl.abs(_apply(gate_up, start, limit, SIZE, ACTIVATION, GATED, TILE))
            peaks = tl.maximum(peaks, part, propagate_nan=tl.PropagateNan.ALL)
        step = row_step(row_peak(peaks), fixed)
        for start in range(0, SIZE, TILE):
            part = _apply(gate_up, start, limit, SIZE, ACTIVATION, GATED, TILE)
            place = codes + start + columns
            tl.store(place, to_codes(part, step), mask=columns < SIZE - start)
    tl.store(steps + row, step)
