"""Activations of MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from splitserve.models.config import MlpConfig

Activate: TypeAlias = Callable[[Tensor], Tensor]

# gpt-oss's, from its reference implementation.
_SWIGLU_ALPHA: Final = 1.702


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_PLAIN: Final[Mapping[str, Activate]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
}


def make_activation(config: MlpConfig) -> Activate:
    """From (rows, 2 * size) with the gate's columns first, or (rows, size) without a gate, to
    (rows, size).
    """
    if config.activation == "clamped_swiglu":
        return partial(_clamped_swiglu, limit=config.limit)
    activate = _PLAIN[config.activation]
    if not config.gated:
        return activate

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate) * up

    return gated


def _clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Columns alternate: gate, up, gate, up."""
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(gate * _SWIGLU_ALPHA)
