"""Feed-forward layers: one MLP, or a mixture of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from splitserve.models.config import ExpertsConfig
from splitserve.models.layers.activation import Activate
from splitserve.models.linear import Linear
from splitserve.quant.linear_protocol import Rows, multiply


@dataclass(frozen=True)
class Mlp:
    """One MLP, or a rank's part of it."""

    gate_up: Linear
    down: Linear
    activate: Activate

    def keeps_to_device(self, rows: int) -> bool:
        """Whether, with so many rows, no launch depends on what was computed."""
        return True

    def __call__(self, x: Rows) -> Tensor:
        """(rows, hidden_size), to be summed over ranks."""
        return multiply(self.down, self.activated(x))

    def activated(self, x: Rows) -> Rows:
        """(rows, size): what is between the products."""
        return self.activate(multiply(self.gate_up, x))


class Experts:
    """A mixture of MLPs (Shazeer et al. 2017), of which a rank has some.

    A token's experts are summed one after the other in ascending order, whatever else is in the
    step: its sum does not depend on its neighbours.
    """

    def __init__(self, config: ExpertsConfig, router: Linear, experts: Mapping[int, Mlp]) -> None:
        """`experts` has this rank's by their numbers; every rank has the router."""
        self._config = config
        self._router = router
        self._experts = dict(sorted(experts.items()))

    def keeps_to_device(self, rows: int) -> bool:
        """See `Mlp`. The host counts each expert's tokens."""
        return False

    def __call__(self, x: Rows) -> Tensor:
        """(rows, hidden_size), to be summed over ranks. Waits for the device once."""
        assert isinstance(x, Tensor)  # codes are for a single MLP
        chosen, weights = self.route(x)
        return self._one(x, chosen, weights) if x.shape[0] == 1 else self._many(x, chosen, weights)

    def _one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """One token: nothing to be gathered."""
        out = torch.zeros_like(x)
        numbers: list[int] = chosen[0].tolist()
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            expert = self._experts.get(numbers[place])
            if expert is not None:
                out += expert(x) * weights[:, place, None]
        return out

    def _many(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Pairs of a token and its expert, those of one expert in a run, tokens ascending."""
        out = torch.zeros_like(x)
        order = chosen.flatten().argsort(stable=True)
        rows, shares = order // chosen.shape[1], weights.flatten()[order, None]
        counts: list[int] = chosen.flatten().bincount(minlength=self._config.count).tolist()
        ends = list(accumulate(counts))
        for index, expert in self._experts.items():
            if counts[index]:
                run = slice(ends[index] - counts[index], ends[index])
                # No row twice in a run, so that this adds in one order on any device.
                out.index_add_(0, rows[run], expert(x[rows[run]]) * shares[run])
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's experts and their weights: (rows, top_k) int64 and the type of `x`."""
        config, scores = self._config, self._router(x)
        if config.softmax == "chosen":
            values, chosen = scores.topk(config.top_k, dim=-1)
            return chosen, torch.softmax(values.float(), dim=-1).to(x.dtype)
        values, chosen = torch.softmax(scores.float(), dim=-1).topk(config.top_k, dim=-1)
        if config.renormalized:
            values = values / values.sum(-1, keepdim=True)
        return chosen, values.to(x.dtype)
