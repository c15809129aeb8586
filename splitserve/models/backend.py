"""Who computes what lies between matrix products: norms, activations, rotation.

The products themselves are `linear.Products`, attention over the pool is the engine's. A backend
is chosen when an engine starts; a family's layers are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from splitserve.models.config import ExpertsConfig, MlpConfig, NormConfig
from splitserve.models.layers.activation import make_activation
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.layers.norm import Norm, make_norm
from splitserve.models.layers.rotary import Rotary
from splitserve.models.linear import Linear
from splitserve.models.rope import RopeConfig


class Backend(Protocol):
    """Makes a model's small layers."""

    turns_in_attend: bool
    """Whether `Attend` turns queries and keys; see `SelfAttention`."""

    def norm(
        self,
        config: NormConfig,
        weight: Tensor | None,
        bias: Tensor | None,
        readers: Sequence[Linear] = (),
    ) -> Norm:
        """A norm over the last dimension. A weight of two dimensions is one for each head.

        `readers` are all the products that its result goes to, where they are known.
        """
        ...

    def rotary(
        self, config: RopeConfig, context: int, dtype: torch.dtype, device: torch.device
    ) -> Rotary:
        """A rope, to serve up to `context` tokens."""
        ...

    def mlp(self, gate_up: Linear, down: Linear, config: MlpConfig) -> Mlp:
        """One MLP, or a rank's part of it."""
        ...

    def experts(self, config: ExpertsConfig, router: Linear, experts: Mapping[int, Mlp]) -> Experts:
        """A mixture of which a rank has `experts`, by their numbers."""
        ...


class TorchBackend:
    """Plain torch, on any device."""

    turns_in_attend = False

    def norm(
        self,
        config: NormConfig,
        weight: Tensor | None,
        bias: Tensor | None,
        readers: Sequence[Linear] = (),
    ) -> Norm:
        """See `Backend`."""
        return make_norm(config, weight, bias)

    def rotary(
        self, config: RopeConfig, context: int, dtype: torch.dtype, device: torch.device
    ) -> Rotary:
        """See `Backend`."""
        return Rotary(config, context, dtype, device)

    def mlp(self, gate_up: Linear, down: Linear, config: MlpConfig) -> Mlp:
        """See `Backend`."""
        return Mlp(gate_up, down, make_activation(config))

    def experts(self, config: ExpertsConfig, router: Linear, experts: Mapping[int, Mlp]) -> Experts:
        """See `Backend`."""
        return Experts(config, router, experts)
