"""A head as 8-bit codes with one bfloat16 scale, as `QuantizedPageMemory` keeps them.

A scale is rounded before codes are made with it, so that it costs range, not accuracy. An int8
scale fits the largest magnitude; of e4m3, whose steps are relative, the best of several is taken.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.fp8_rows import row_peak

SCALES_TRIED: Final = 8
"""Of e4m3, from the one that fits the largest magnitude up to twice it."""

_LEAST_SCALE = tl.constexpr(2.0**-126)
_TRIED = tl.constexpr(SCALES_TRIED)
# Added and taken off, it leaves an fp32 below 2^22 rounded to an integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


def encode_reference(source: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and bfloat16 scales, (rows, kv_heads, head_dim) and (rows, kv_heads, 1)."""
    most = 127.0 if codes is torch.int8 else 448.0
    tried = 1 if codes is torch.int8 else SCALES_TRIED
    wide = source.float()[..., None, :]
    growth = torch.exp2(torch.arange(tried, device=source.device) / tried)[:, None]
    scales = (wide.abs().amax(-1, keepdim=True) / most * growth).to(torch.bfloat16)
    scaled = (wide / scales.float().clamp_min(2.0**-126)).clamp(-most, most)
    coded = (scaled.round() if codes is torch.int8 else scaled).to(codes)
    lost = (coded.float() * scales.float() - wide).square().sum(-1, keepdim=True)
    best = lost.argmin(-2, keepdim=True)
    places = best.expand(*best.shape[:-1], coded.shape[-1])
    taken = coded.view(torch.uint8).gather(-2, places).view(codes)
    return taken.squeeze(-2), scales.gather(-2, best).squeeze(-2)


@triton.jit
def to_head_codes(x: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Codes of fp32 `x` for a scale that is not yet kept from zero."""
    scaled = tl.div_rn(x, tl.zeros_like(x) + tl.maximum(scale, _LEAST_SCALE))
    if dtype == tl.int8:
        scaled = tl.clamp(scaled, -127.0, 127.0)
        codes = ((scaled + _ROUNDER) - _ROUNDER).to(tl.int8)
    else:
        scaled = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        codes = scaled.to(dtype)
    return codes


@triton.jit
def _lost(x: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    error = to_head_codes(x, scale, dtype).to(tl.float32) * scale - x
    return tl.sum(error * error, 0)


@triton.jit
def choose_scale(a: tl.tensor, b: tl.tensor, rest: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A head's scale, fp32 as rounded to bfloat16: that of the least squared error."""
    peak = tl.maximum(row_peak(a), row_peak(b), propagate_nan=tl.PropagateNan.ALL)
    peak = tl.maximum(peak, row_peak(rest), propagate_nan=tl.PropagateNan.ALL)
    if dtype == tl.int8:
        best = tl.div_rn(peak, 127.0).to(tl.bfloat16).to(tl.float32)
    else:
        least = tl.div_rn(peak, 448.0)
        best = least.to(tl.bfloat16).to(tl.float32)
        best_lost = _lost(a, best, dtype) + _lost(b, best, dtype) + _lost(rest, best, dtype)
        for i in tl.static_range(1, _TRIED):
            growth = tl.exp2(tl.full((), i / _TRIED, tl.float32))
            scale = (least * growth).to(tl.bfloat16).to(tl.float32)
            lost = _lost(a, scale, dtype) + _lost(b, scale, dtype) + _lost(rest, scale, dtype)
            best = tl.where(lost < best_lost, scale, best)
            best_lost = tl.minimum(lost, best_lost)
    return best
