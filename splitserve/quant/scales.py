"""Scales between activations and weights, so that what is hard to round is made easy.

A product x @ W.T is unchanged if column j of W is multiplied by s[j] and x[j] divided by it. Both
methods choose s from what was seen of the layer's input on some text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from splitserve.quant.gptq import quantize_int4_gptq
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.quant.quantizers import quantize_int8

_LEAST: Final = 1e-5
_STRENGTH: Final = 0.5
# Powers of the inputs' mean magnitude that are tried, on so many of the inputs.
_POWERS: Final = (0.0, 0.15, 0.3, 0.45, 0.6)
_TRIAL_ROWS: Final = 256


@dataclass(frozen=True)
class InputSeen:
    """What a product's input was like on the text."""

    rows: Tensor
    """All of them, (rows, columns)."""

    @property
    def most(self) -> Tensor:
        """The greatest magnitude, (columns,) fp32."""
        return self.rows.abs().amax(0).float()

    @property
    def mean(self) -> Tensor:
        """The mean magnitude, (columns,) fp32."""
        return self.rows.float().abs().mean(0)


def smooth(weight: Tensor, seen: InputSeen) -> QuantizedMatrix:
    """SmoothQuant (Xiao et al. 2023), strength 0.5: outliers of the input are moved into the
    weight, so that both can be rounded to 8 bits.
    """
    weight = weight.float()
    heaviest = weight.abs().amax(0).clamp_min(_LEAST)
    scale = seen.most.clamp_min(_LEAST).pow(_STRENGTH) / heaviest.pow(1 - _STRENGTH)
    scale = scale.clamp_min(_LEAST)
    return replace(quantize_int8(weight * scale), smoothing=scale, quantizes_input=True)


def activation_aware(weight: Tensor, seen: InputSeen, group_size: int = 32) -> QuantizedMatrix:
    """AWQ's scales (Lin et al. 2024), GPTQ's rounding.

    Columns that large inputs meet are made finer, by that power of the inputs' mean magnitude
    which loses least on a sample when groups are simply rounded.
    """
    weight, rows = weight.float(), seen.rows.float()
    scale = _best_scale(
        weight, rows[:: max(1, rows.shape[0] // _TRIAL_ROWS)], seen.mean, group_size
    )
    made = quantize_int4_gptq(weight * scale, rows / scale, group_size)
    return replace(made, smoothing=scale)


def _best_scale(weight: Tensor, rows: Tensor, mean: Tensor, group_size: int) -> Tensor:
    target = rows @ weight.T
    best, least = torch.ones_like(mean), torch.inf
    for power in _POWERS:
        scale = mean.clamp_min(_LEAST).pow(power)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = _rounded(weight * scale, group_size) / scale
        lost = float((rows @ rounded.T - target).square().sum())
        if lost < least:
            best, least = scale, lost
    return best


def _rounded(weight: Tensor, group_size: int) -> Tensor:
    """What groups of 4 bits make of a weight, their ranges as they are."""
    groups = weight.view(weight.shape[0], -1, group_size)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-low / step).round()
    codes = (groups / step + zero).round_().clamp_(0, 15)
    return ((codes - zero) * step).view(weight.shape)
