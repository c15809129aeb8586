"""Which tensors, and which parts of them, make a model. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.weights.source import MatrixSource, TensorSource


@dataclass(frozen=True)
class NormPlan:
    """One norm. Several weights are those of heads, to be stacked."""

    weights: tuple[TensorSource, ...]
    bias: TensorSource | None


@dataclass(frozen=True)
class ProjectionPlan:
    """One product: matrices that read the same input, stacked in this order, and their biases."""

    weights: tuple[MatrixSource, ...]
    biases: tuple[TensorSource, ...] = ()


@dataclass(frozen=True)
class MlpPlan:
    """`gate_up` has the gate's rows before the up's."""

    gate_up: ProjectionPlan
    down: ProjectionPlan


@dataclass(frozen=True)
class ExpertsPlan:
    """The router, which every rank has, and the rank's own experts by their numbers."""

    router: ProjectionPlan
    experts: dict[int, MlpPlan]


@dataclass(frozen=True)
class LayerPlan:
    """One layer; `norms` has those slots of `BlockNorms` that the family fills."""

    norms: dict[str, NormPlan]
    qkv: ProjectionPlan
    attention_out: ProjectionPlan
    query_norm: NormPlan | None
    key_norm: NormPlan | None
    sinks: TensorSource | None
    mlp: MlpPlan | ExpertsPlan


@dataclass(frozen=True)
class EmbeddingPlan:
    """What turns tokens into the first hidden state."""

    tokens: TensorSource
    positions: TensorSource | None
    norm: NormPlan | None
    projection: ProjectionPlan | None


@dataclass(frozen=True)
class HeadPlan:
    """What turns the last hidden state into logits. No `unembedding` if it is the embedding."""

    norm: NormPlan | None
    projection: ProjectionPlan | None
    unembedding: ProjectionPlan
