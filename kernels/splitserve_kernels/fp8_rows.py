"""Rows as e4m3 codes with a step a row: what products of 8-bit inputs take.

A row's step puts its largest magnitude at the largest code. It is 1 for a row of zeros, that of
LEAST_PEAK for a row whose largest is less, and NaN for a row with a NaN, which codes that saturate
could not say. Numbers are multiplied by its inverse: a division each would take as long as the
memory does.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before

FP8_MAX: Final = 448.0
MOST_TILE: Final = 16384
"""The widest row that a program holds in registers; it reads a wider one twice."""

LEAST_PEAK: Final = 2.0**-100
"""What counts as a row's largest magnitude where that is less: its step's inverse is finite."""

_FP8_MAX, _LEAST_PEAK = tl.constexpr(FP8_MAX), tl.constexpr(LEAST_PEAK)


def quantize_rows_fp8(x: Tensor, *, step: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes, (rows, width) e4m3, and steps, (rows, 1) fp32, of (rows, width) `x`.

    x: a 16-bit type or fp32, contiguous in the last dimension
    step: one step for all rows, in place of each row's own

    Raises `ValueError` for a shape or type that is not supported.
    """
    check_rows(x)
    rows, width = x.shape
    codes, steps = empty_codes(rows, width, x.device)
    tile = row_tile(width)
    early = launches_early(x.device)
    _quantize[(rows,)](
        x,
        codes,
        steps,
        step,
        x.stride(0),
        WIDTH=width,
        TILE=tile,
        num_warps=row_warps(tile),
        EARLY=early,
        launch_pdl=early,
    )
    return codes, steps


def quantize_rows_fp8_reference(x: Tensor, *, step: float | None = None) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    if step is None:
        peak = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
        steps = (peak.clamp_min(LEAST_PEAK) / FP8_MAX).masked_fill_(peak == 0, 1.0)
    else:
        steps = x.new_full((x.shape[0], 1), step, dtype=torch.float32)
        steps.masked_fill_(x.isnan().any(dim=1, keepdim=True), float("nan"))
    scaled = (x.float() * (1 / steps)).clamp_(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), steps


def empty_codes(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for codes and steps."""
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty((rows, 1), dtype=torch.float32, device=device)


def check_rows(x: Tensor) -> None:
    """Raise `ValueError` unless `x` is (rows, width) in a supported type, each row contiguous."""
    if x.ndim != 2 or x.stride(1) != 1:
        raise ValueError(f"expected contiguous rows, got {tuple(x.shape)} by {x.stride()}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"type {x.dtype} is not supported")


def row_tile(width: int) -> int:
    """How many elements of a row a program holds at once."""
    return min(MOST_TILE, int(triton.next_power_of_2(width)))


def row_warps(tile: int) -> int:
    """Warps for a tile of one row: eight to 32 elements a thread."""
    return min(16, max(1, tile // 512))


@triton.jit
def row_peak(x: tl.tensor) -> tl.tensor:
    """The largest magnitude of a tile, NaN if it has one."""
    nan = tl.max((x != x).to(tl.int32), 0)
    return tl.where(nan > 0, float("nan"), tl.max(tl.abs(x), 0))


@triton.jit
def row_step(peak: tl.tensor, fixed: tl.tensor) -> tl.tensor:
    """The step of a row with this peak. `fixed` may be None."""
    if fixed is None:
        # NaN is no number's maximum here.
        least = tl.where(peak < _LEAST_PEAK, _LEAST_PEAK, peak)
        step = tl.where(peak == 0, 1.0, tl.div_rn(least, _FP8_MAX))
    else:
        step = tl.where(peak == peak, fixed, float("nan"))
    return step


@triton.jit
def to_codes(x: tl.tensor, step: tl.tensor) -> tl.tensor:
    """e4m3 codes of fp32 `x`, saturating."""
    scaled = x * tl.div_rn(1.0, step)
    scaled = tl.clamp(scaled, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv)


@triton.jit
def _quantize(
    # pointers
    x: tl.tensor,
    codes: tl.tensor,
    steps: tl.tensor,
    # numbers
    fixed: tl.tensor,
    # strides, in elements
    x_stride: tl.tensor,
    # constants
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One row."""
    if EARLY:
        wait_for_the_kernel_before()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    x += row * x_stride
    codes += row * WIDTH
    if WIDTH <= TILE:
        wide = tl.load(x + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        step = row_step(row_peak(wide), fixed)
        tl.store(codes + columns, to_codes(wide, step), mask=columns < WIDTH)
    else:
        peaks = tl.zeros([TILE], tl.float32)
        for start in range(0, WIDTH, TILE):
            part = tl.load(x + start + columns, mask=columns < WIDTH - start, other=0.0)
            part = tl.abs(part.to(tl.float32))
            peaks = tl.maximum(peaks, part, propagate_nan=tl.PropagateNan.ALL)
        step = row_step(row_peak(peaks), fixed)
        for start in range(0, WIDTH, TILE):
            inside = columns < WIDTH - start
            part = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes + start + columns, to_codes(part, step), mask=inside)
    tl.store(steps + row, step)
