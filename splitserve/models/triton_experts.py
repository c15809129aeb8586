"""A mixture of experts whose routing stays on the device. Imports triton: only for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from splitserve_kernels.grouped_linear import grouped_linear
from torch import Tensor

from splitserve.models.config import ExpertsConfig
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.linear import Linear
from splitserve.models.triton_linear import TritonLinear
from splitserve.quant.linear_protocol import Rows

MOST_ROWS = 256
"""With more, an expert has enough rows for a library's product, and the host may look at them."""


class TritonExperts(Experts):
    """`Experts` that steps of few rows compute in two grouped products, whoever is chosen."""

    def __init__(self, config: ExpertsConfig, router: Linear, experts: Mapping[int, Mlp]) -> None:
        super().__init__(config, router, experts)
        parts = list(self._experts.values())
        self._gate_up = _stack([part.gate_up for part in parts])
        self._down = _stack([part.down for part in parts])
        self._activate: Callable[[Tensor], Tensor] = parts[0].activate
        device = self._gate_up[0].device
        # Where an expert stands in this rank's stacks; behind them all if it is not here.
        self._places = torch.full((config.count,), len(parts), device=device)
        for place, number in enumerate(self._experts):
            self._places[number] = place

    @staticmethod
    def takes(experts: Mapping[int, Mlp]) -> bool:
        """Plain weights, which can be stacked."""
        products = [p for part in experts.values() for p in (part.gate_up, part.down)]
        return bool(products) and all(isinstance(p, TritonLinear) for p in products)

    def keeps_to_device(self, rows: int) -> bool:
        """See `Mlp`."""
        return rows <= MOST_ROWS

    def __call__(self, x: Rows) -> Tensor:
        """See `Experts`."""
        assert isinstance(x, Tensor)  # codes are for a single MLP
        if not self.keeps_to_device(x.shape[0]):
            return super().__call__(x)
        chosen, weights = self.route(x)
        places = self._places[chosen.flatten()]
        ranked, order = places.sort(stable=True)
        experts = torch.arange(len(self._experts) + 1, device=x.device)
        offsets = torch.searchsorted(ranked, experts)
        fed = _product(x[order // chosen.shape[1]], self._gate_up, ranked, offsets)
        fed = _product(self._activate(fed), self._down, ranked, offsets)
        # Each pair of a token and its expert where it was, those of no expert here as zeros.
        pairs = torch.zeros_like(fed).index_copy_(
            0, order, torch.where((ranked < len(self._experts))[:, None], fed, 0.0)
        )
        shares = weights[..., None].float()
        return (pairs.view(*chosen.shape, -1) * shares).sum(1).to(x.dtype)


def _product(
    x: Tensor, stack: tuple[Tensor, Tensor | None], ranked: Tensor, offsets: Tensor
) -> Tensor:
    weights, biases = stack
    out = grouped_linear(x, weights, offsets)
    if biases is None:
        return out
    return out + biases[ranked.clamp(max=len(biases) - 1)]


def _stack(products: list[Linear]) -> tuple[Tensor, Tensor | None]:
    """(experts, out, in) weights, of which the products become views, and (experts, out) biases."""
    linears = [product for product in products if isinstance(product, TritonLinear)]
    weights = torch.stack([linear.weight for linear in linears])
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = weight
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return weights, torch.stack(biases) if biases else None
