"""Moves what a product's input is divided by into what makes that input.

A matrix with smoothing is read right only by who divides its input. Divide the norm's weight
instead, or the rows of the product before it, and nothing is left to be known: any reader of the
format computes the same. This is what makes

    norm -> query, key, value        norm -> gate, up
    value -> attention's output      up -> down

where nobody else reads the same numbers and nothing bends them on their way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from splitserve.models.config import MlpConfig, ModelConfig
from splitserve.models.plan import ExpertsPlan, LayerPlan, MlpPlan, NormPlan, ProjectionPlan
from splitserve.quant.matrix import QuantizedMatrix
from splitserve.weights.arrays import numbers_of
from splitserve.weights.source import MatrixSource, TensorSource


class Folding:
    """One layer's matrices by their plans, of which it folds those it can.

    `divisors` are what stored vectors (norms and biases) are to be divided by, by their names.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: LayerPlan,
        matrices: Mapping[ProjectionPlan, QuantizedMatrix],
    ) -> None:
        """Matrices are whole: those of the only rank."""
        self.matrices = dict(matrices)
        self.divisors: dict[str, Tensor] = {}
        self._config = config
        self._plan = plan

    def fold(self) -> None:
        """Folds all that can be folded."""
        self._fold_norms()
        attention, plan = self._config.attention, self._plan
        if attention.num_heads == attention.num_kv_heads and attention.clip_qkv is None:
            values = attention.query_size + attention.kv_size
            self._into_rows(plan.qkv, values, plan.attention_out)
        if isinstance(plan.mlp, MlpPlan):
            self._fold_mlp(plan.mlp, self._config.mlp)
        elif self._config.experts is not None:
            for expert in plan.mlp.experts.values():
                self._fold_mlp(expert, self._config.experts.mlp)

    def _fold_norms(self) -> None:
        norms, mlp = self._plan.norms, self._plan.mlp
        uses = Counter(weight.name for norm in norms.values() for weight in norm.weights)
        own = {
            slot: norm
            for slot, norm in norms.items()
            if len(norm.weights) == 1 and uses[norm.weights[0].name] == 1
        }
        if self._config.norm.weight_offset or (self._config.parallel and "mlp_input" not in norms):
            return
        if "attention_input" in own:
            self._into_norm(own["attention_input"], self._plan.qkv)
        # A router reads the same norm as the experts, each of which has a smoothing of its own.
        if "mlp_input" in own and not isinstance(mlp, ExpertsPlan):
            self._into_norm(own["mlp_input"], mlp.gate_up)

    def _fold_mlp(self, plan: MlpPlan, config: MlpConfig | None) -> None:
        """Without a gate, and where gate and up are cut off, the way to `down` is not linear."""
        if config is not None and config.gated and config.activation != "clamped_swiglu":
            self._into_rows(plan.gate_up, config.size, plan.down)

    def _into_norm(self, norm: NormPlan, product: ProjectionPlan) -> None:
        smoothing = self._take_smoothing(product)
        if smoothing is not None:
            self._divide(norm.weights[0], smoothing)
            if norm.bias is not None:
                self._divide(norm.bias, smoothing)

    def _into_rows(self, product: ProjectionPlan, first: int, reader: ProjectionPlan) -> None:
        """`reader` reads the outputs of `product` from `first` on, each as one column."""
        smoothing = self._take_smoothing(reader)
        if smoothing is None:
            return
        matrix = self.matrices[product]
        divisor = torch.ones(matrix.shape[0])
        divisor[first : first + len(smoothing)] = smoothing
        self.matrices[product] = replace(matrix, scales=matrix.scales / divisor[:, None])
        start = 0
        for bias in product.biases:
            end = start + bias.read_shape[0]
            self._divide(bias, divisor[start:end])
            start = end

    def _take_smoothing(self, product: ProjectionPlan) -> Tensor | None:
        matrix = self.matrices[product]
        self.matrices[product] = replace(matrix, smoothing=None)
        return matrix.smoothing

    def _divide(self, vector: TensorSource, divisor: Tensor) -> None:
        self.divisors[vector.name] = stored_rows(vector, divisor)


def stored_rows(source: TensorSource | MatrixSource, taken: Tensor) -> Tensor:
    """What a source takes whole, rows in its order, as the checkpoint stores it."""
    if source.rows is None:
        return taken
    order = torch.from_numpy(numbers_of(source.rows))
    assert len(order) == source.shape[0]
    # Bytes: there is no copy by index for every type of codes.
    rows = taken.contiguous().view(torch.uint8).view(taken.shape[0], -1)
    return torch.empty_like(rows).index_copy_(0, order, rows).view(taken.dtype).view(taken.shape)
