"""Plain weights to codes: per-row int8 and fp8, grouped int4.

All work on slabs of rows, so that a matrix of any size needs a fixed amount of extra memory.
Scales are rounded to bf16 before codes are chosen: checkpoints and kernels keep them in bf16,
and a scale rounded afterwards would be wrong for all of its codes in the same direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitserve.quant.matrix import FP8_MAX, CodeKind, QuantizedMatrix

_SLAB_WEIGHTS = 1 << 21
_INT4_CLIPS = tuple(1.0 - step / 40 for step in range(15))
_FP8_GROWTH = tuple(2.0 ** (step / 16) for step in range(16))
_INT8_CLIPS = tuple(1.0 - step / 40 for step in range(5))


@dataclass(frozen=True)
class _Coded:
    """Codes of a (rows, groups, group) slab with scales and zeros of shape (rows, groups, 1)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        return (self.codes - self.zeros) * self.scales


_Encode = Callable[[Tensor, float], _Coded]


def quantize_int8(weight: Tensor, input_importance: Tensor | None = None) -> QuantizedMatrix:
    """Symmetric, one scale a row. With an importance, (columns,), the range may be clipped.

    `input_importance` is the mean square of each input: what an error in that column costs.
    """
    clips = (1.0,) if input_importance is None else _INT8_CLIPS
    return _quantize(weight, "int8", weight.shape[1], _encode_int8, clips, input_importance)


def quantize_int4(
    weight: Tensor, group_size: int = 32, input_importance: Tensor | None = None
) -> QuantizedMatrix:
    """Codes 0..15 with an integer zero, `group_size` columns a scale, clipped for least error.

    The error is squared, weighted by `input_importance` (see `quantize_int8`) where given.
    Raises `ValueError` if `group_size` does not divide the columns.
    """
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"groups of {group_size} do not divide {weight.shape[1]} columns")
    return _quantize(weight, "int4", group_size, _encode_int4, _INT4_CLIPS, input_importance)


def quantize_fp8(weight: Tensor, input_importance: Tensor | None = None) -> QuantizedMatrix:
    """E4M3, one scale a row: the best of several within twice the least one that clips nothing.

    A float's steps are relative, so that a larger scale costs nothing at the top and may fit a
    row's weights better.
    """
    return _quantize(weight, "fp8", weight.shape[1], _encode_fp8, _FP8_GROWTH, input_importance)


def _quantize(
    weight: Tensor,
    kind: CodeKind,
    group_size: int,
    encode: _Encode,
    clips: tuple[float, ...],
    importance: Tensor | None,
) -> QuantizedMatrix:
    rows, columns = weight.shape
    groups = columns // group_size
    code_dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    codes = torch.empty(rows, columns, dtype=code_dtype, device=weight.device)
    scales = torch.empty(rows, groups, device=weight.device)
    zeros = torch.empty_like(scales) if kind == "int4" else None
    cost = None if importance is None else importance.float().view(groups, group_size)
    slab = max(1, _SLAB_WEIGHTS // columns)
    for start in range(0, rows, slab):
        part = weight[start : start + slab].float()
        if not torch.isfinite(part).all():
            raise ValueError("a weight that is not finite cannot be quantised")
        coded = _least_error(part.view(-1, groups, group_size), encode, clips, cost)
        end = start + part.shape[0]
        codes[start:end] = coded.codes.view(-1, columns).to(code_dtype)
        scales[start:end] = coded.scales.squeeze(-1)
        if zeros is not None:
            zeros[start:end] = coded.zeros.squeeze(-1)
    return QuantizedMatrix(kind, codes, scales, zeros)


def _least_error(
    values: Tensor, encode: _Encode, clips: tuple[float, ...], cost: Tensor | None
) -> _Coded:
    """Each group's best of several clipped ranges."""
    best = encode(values, clips[0])
    if len(clips) == 1:
        return best
    least = _error(best, values, cost)
    for clip in clips[1:]:
        other = encode(values, clip)
        error = _error(other, values, cost)
        better = error < least
        least = torch.where(better, error, least)
        best = _Coded(
            torch.where(better, other.codes, best.codes),
            torch.where(better, other.scales, best.scales),
            torch.where(better, other.zeros, best.zeros),
        )
    return best


def _error(coded: _Coded, values: Tensor, cost: Tensor | None) -> Tensor:
    squared = (coded.values() - values).square_()
    if cost is not None:
        squared *= cost
    return squared.sum(-1, keepdim=True)


def _encode_int8(values: Tensor, clip: float) -> _Coded:
    scales = bf16_not_below(values.abs().amax(-1, keepdim=True) * clip / 127)
    codes = (values / scales).round_().clamp_(-127, 127)
    return _Coded(codes, scales, torch.zeros_like(scales))


def _encode_int4(values: Tensor, clip: float) -> _Coded:
    low = values.amin(-1, keepdim=True).clamp_(max=0) * clip
    high = values.amax(-1, keepdim=True).clamp_(min=0) * clip
    scales = bf16_not_below((high - low) / 15)
    zeros = (-low / scales).round_().clamp_(0, 15)
    codes = (values / scales + zeros).round_().clamp_(0, 15)
    return _Coded(codes, scales, zeros)


def _encode_fp8(values: Tensor, clip: float) -> _Coded:
    scales = bf16_not_below(values.abs().amax(-1, keepdim=True) * clip / FP8_MAX)
    codes = (values / scales).clamp_(-FP8_MAX, FP8_MAX)
    return _Coded(codes, scales, torch.zeros_like(scales))


def bf16_not_below(scales: Tensor) -> Tensor:
    """The next bf16 not below each, in fp32, so that the largest value still has a code.

    A range of nothing, and one too small for normal numbers, gets a scale of the least that works.
    """
    floor = torch.finfo(torch.float32).tiny
    bits = scales.clamp(min=floor).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
