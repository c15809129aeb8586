"""Norms and activations by our Triton kernels. Imports triton: only for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from splitserve_kernels.activation import activate, activate_fp8
from splitserve_kernels.all_reduce import all_reduce_add_norm
from splitserve_kernels.norm import add_norm, add_norm_fp8, heads_norm
from splitserve_kernels.rotary import rotation
from splitserve_kernels.small_multiply import Activation as GateActivation
from torch import Tensor

from splitserve.models.config import ExpertsConfig, MlpConfig, NormConfig
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.layers.norm import Norm
from splitserve.models.layers.rotary import Rotary, Rotation
from splitserve.models.linear import Linear
from splitserve.models.rope import RopeConfig
from splitserve.models.triton_experts import TritonExperts
from splitserve.models.triton_linear import TritonLinear
from splitserve.parallel.group import Group
from splitserve.quant.fp8_linear import Fp8Linear
from splitserve.quant.linear_protocol import CodedRows, Rows, multiply


class TritonBackend:
    """Implements `Backend`."""

    turns_in_attend = True

    def norm(
        self,
        config: NormConfig,
        weight: Tensor | None,
        bias: Tensor | None,
        readers: Sequence[Linear] = (),
    ) -> Norm:
        """See `Backend`."""
        if weight is not None and config.weight_offset:
            weight = weight.float() + config.weight_offset
        codes = bool(readers) and all(_takes_codes(reader) for reader in readers)
        return TritonNorm(config, weight, bias, codes=codes)

    def rotary(
        self, config: RopeConfig, context: int, dtype: torch.dtype, device: torch.device
    ) -> Rotary:
        """See `Backend`."""
        return TritonRotary(config, context, dtype, device)

    def mlp(self, gate_up: Linear, down: Linear, config: MlpConfig) -> Mlp:
        """See `Backend`."""
        options: dict[str, Any] = {
            "activation": config.activation,
            "gated": config.gated,
            "limit": config.limit,
        }
        act = partial(activate, **options)
        codes = partial(activate_fp8, **options) if _takes_codes(down) else None
        in_product = config.gated and config.activation in get_args(GateActivation)
        gate = cast(GateActivation, config.activation) if in_product else None
        return TritonMlp(gate_up, down, act, codes, gate)

    def experts(self, config: ExpertsConfig, router: Linear, experts: Mapping[int, Mlp]) -> Experts:
        """See `Backend`."""
        kind = TritonExperts if TritonExperts.takes(experts) else Experts
        return kind(config, router, experts)


class TritonRotary(Rotary):
    """One that makes cosines and sines in one launch."""

    def rotation(self, positions: Tensor) -> Rotation:
        """See `Rotary.rotation`."""
        cos, sin = rotation(
            positions, self._inverse, self._factor, self._dtype, interleaved=self._interleaved
        )
        return Rotation(cos, sin, self._interleaved)


@dataclass(frozen=True)
class TritonMlp(Mlp):
    """One that activates in the product's own launch, or to codes, where that is of use."""

    activate_to_codes: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    gate: GateActivation | None
    """What a product's own launch can activate by."""

    def activated(self, x: Rows) -> Rows:
        """See `Mlp`."""
        if self.gate is not None:
            activated = self._in_product(x, self.gate)
            if activated is not None:
                return activated
        if self.activate_to_codes is None:
            return super().activated(x)
        return CodedRows(*self.activate_to_codes(multiply(self.gate_up, x)))

    def _in_product(self, x: Rows, gate: GateActivation) -> Tensor | None:
        if isinstance(x, Tensor):
            return self.gate_up.gated(x, gate) if isinstance(self.gate_up, TritonLinear) else None
        return self.gate_up.gated(x, gate) if isinstance(self.gate_up, Fp8Linear) else None


class TritonNorm:
    """Implements `Norm`: the sum before it, and codes after it, in the same launch; without codes
    the ranks' sum, too, where the group has peers.
    """

    def __init__(
        self, config: NormConfig, weight: Tensor | None, bias: Tensor | None, *, codes: bool
    ) -> None:
        """`weight` has the config's offset already. `codes`: those who `read` take codes."""
        wide = weight is not None and (config.fp32_weight or weight.dtype.itemsize == 4)
        self._weight = weight.float() if wide and weight is not None else weight
        self._bias = bias
        self._eps = config.eps
        self._codes = codes
        self._options: dict[str, Any] = {"kind": config.kind, "wide_weight": wide}

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`. Heads, (rows, heads, head_dim), are normalised in place."""
        if x.ndim == 2:
            return add_norm(x, None, self._weight, self._bias, self._eps, **self._options)[1]
        assert self._weight is not None
        return heads_norm(x, self._weight, self._bias, self._eps, **self._options)

    def read(
        self, x: Tensor, delta: Tensor | None, group: Group | None = None
    ) -> tuple[Tensor, Rows]:
        """See `Norm.read`."""
        if delta is not None and group is not None:
            peers = None if self._codes else group.peers(delta)
            if peers is not None:
                weights = (self._weight, self._bias, self._eps)
                return all_reduce_add_norm(delta, x, *weights, peers, **self._options)
            delta = group.all_reduce(delta)
        own = (x, delta, self._weight, self._bias, self._eps)
        if not self._codes:
            return add_norm(*own, **self._options)
        total, codes, steps = add_norm_fp8(*own, **self._options)
        return total, CodedRows(codes, steps)


def _takes_codes(product: Linear) -> bool:
    return isinstance(product, Fp8Linear) and product.takes_codes
