"""Builds a `Decoder` from a checkpoint, as its plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from splitserve.errors import CheckpointError
from splitserve.models.backend import Backend, TorchBackend
from splitserve.models.config import MlpConfig, ModelConfig, NormConfig
from splitserve.models.decoder import Block, BlockNorms, Decoder
from splitserve.models.layers.embedding import Embedding
from splitserve.models.layers.mlp import Experts, Mlp
from splitserve.models.layers.norm import Norm, SplitRmsNorm
from splitserve.models.layers.rotary import Rotary
from splitserve.models.layers.self_attention import AttentionRules, SelfAttention, alibi_slopes
from splitserve.models.layers.unembedding import Unembedding
from splitserve.models.linear import ConcatLinear, Linear, MakeLinear
from splitserve.models.plan import ExpertsPlan, LayerPlan, MlpPlan, NormPlan, ProjectionPlan
from splitserve.models.planner import ModelPlanner
from splitserve.models.rope import RopeConfig
from splitserve.parallel.group import Group
from splitserve.parallel.shard import Shard
from splitserve.quant.matrix import Weight, can_stack, stack_rows
from splitserve.weights.source import MatrixSource, TensorSource


class ReadWeights(Protocol):
    """What loading needs of a checkpoint; see `weights.Checkpoint`."""

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> Tensor:
        """A vector or a table."""

    def matrix(self, source: MatrixSource, dtype: torch.dtype) -> Weight:
        """A projection's weight."""


class Products(Protocol):
    """How weights of each role are multiplied."""

    @property
    def projection(self) -> MakeLinear:
        """Of attention, MLPs and experts."""

    @property
    def unembedding(self) -> MakeLinear:
        """The largest matrix, read for the last row of a sequence only."""

    @property
    def exact(self) -> MakeLinear:
        """Routers and other small ones, never quantised."""


class LoadObserver(Protocol):
    """Is told of a model's parts while they are loaded, in the order of computing."""

    def embedded(self, embedding: Embedding) -> None:
        """The input's side."""

    def loaded(self, block: Block) -> None:
        """The next layer. It may compute before the one after it is read."""


class Loader:
    """Reads one rank's part of a model, layer by layer, and makes its layers.

    Raises `CheckpointError` naming the first tensor at fault, `ConfigError` if the model does not
    divide by the group.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ReadWeights,
        products: Products,
        group: Group,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend | None = None,
    ) -> None:
        """`backend` makes the small layers, plain torch by default."""
        self._config = config
        self._backend = backend or TorchBackend()
        self._weights = weights
        self._products = products
        self._group = group
        self._shard = Shard(group.rank, group.size)
        self._plan = ModelPlanner(config, self._shard)
        self._dtype = dtype
        self._device = device
        self._rotaries: dict[RopeConfig, Rotary] = {}

    @property
    def num_kv_heads(self) -> int:
        """This rank's KV heads."""
        return self._plan.num_kv_heads

    def load(self, context: int, observers: Sequence[LoadObserver] = ()) -> Decoder:
        """The whole model, to serve up to `context` tokens."""
        config = self._config
        embedding = self.embedding()
        blocks = list(self.blocks(embedding, context, observers))
        head = self._plan.head()
        final_norm = self._norm(head.norm, config.norm) if head.norm else None
        unembedding = self._unembedding(embedding.table)
        return Decoder(config, embedding, self._rotaries.values(), blocks, final_norm, unembedding)

    def blocks(
        self, embedding: Embedding, context: int, observers: Sequence[LoadObserver] = ()
    ) -> Iterator[Block]:
        """One layer after the other; whoever keeps none needs the memory of one."""
        for observer in observers:
            observer.embedded(embedding)
        for index, layer in enumerate(self._config.layers):
            rotary = self._rotary(layer.rope, context) if layer.rope else None
            block = self._block(index, rotary)
            for observer in observers:
                observer.loaded(block)
            yield block

    def embedding(self) -> Embedding:
        """The input's side."""
        plan, config = self._plan.embedding(), self._config
        exact = self._products.exact
        return Embedding(
            table=self._tensor(plan.tokens),
            first=self._plan.vocab.start,
            group=self._group,
            scale=config.embedding_scale,
            norm=self._norm(plan.norm, config.norm) if plan.norm else None,
            projection=self._linear(plan.projection, exact) if plan.projection else None,
            positions=self._tensor(plan.positions) if plan.positions else None,
            offset=config.positions.offset if config.positions else 0,
        )

    def _block(self, index: int, rotary: Rotary | None) -> Block:
        """One layer."""
        plan, config = self._plan.layer(index), self._config
        attention, mlp = self._attention(index, plan, rotary), self._feed_forward(plan.mlp)
        feeds = [mlp.gate_up] if isinstance(mlp, Mlp) else []
        readers: dict[str, list[Linear]] = {"attention_input": [attention.qkv], "mlp_input": feeds}
        if config.parallel and "mlp_input" not in plan.norms:
            readers["attention_input"] += feeds
        norms = {
            slot: self._norm(norm, config.norm, readers.get(slot, ()))
            for slot, norm in plan.norms.items()
        }
        return Block(
            attention=attention,
            mlp=mlp,
            norms=BlockNorms(**norms),
            rules=self._rules(index, plan),
            parallel=config.parallel,
            group=self._group,
        )

    def _attention(self, index: int, plan: LayerPlan, rotary: Rotary | None) -> SelfAttention:
        attention = self._config.attention
        qk_norm = attention.qk_norm
        over_all = qk_norm is not None and qk_norm.over == "all"
        return SelfAttention(
            layer=index,
            qkv=self._linear(plan.qkv, self._products.projection),
            out=self._linear(plan.attention_out, self._products.projection),
            num_heads=self._plan.num_heads,
            num_kv_heads=self._plan.num_kv_heads,
            head_dim=attention.head_dim,
            rotary=rotary,
            query_norm=self._qk_norm(plan.query_norm, attention.query_size),
            key_norm=self._qk_norm(plan.key_norm, attention.kv_size),
            norms_all_heads=over_all,
            clip=attention.clip_qkv,
            turns_in_attend=self._backend.turns_in_attend,
        )

    def _rules(self, index: int, plan: LayerPlan) -> AttentionRules:
        attention = self._config.attention
        slopes = None
        if attention.alibi_scale is not None:
            slopes = alibi_slopes(attention.num_heads, attention.alibi_bias_max)
            heads = self._plan.heads
            slopes = slopes[heads.start : heads.stop].to(self._device) * attention.alibi_scale
        return AttentionRules(
            scale=attention.scale,
            window=self._config.layers[index].window,
            soft_cap=attention.soft_cap,
            slopes=slopes,
            sinks=self._tensor(plan.sinks).float() if plan.sinks else None,
        )

    def _feed_forward(self, plan: MlpPlan | ExpertsPlan) -> Mlp | Experts:
        config = self._config
        if isinstance(plan, MlpPlan):
            assert config.mlp is not None
            return self._mlp(plan, config.mlp)
        assert config.experts is not None
        mlp = config.experts.mlp
        experts = {index: self._mlp(part, mlp) for index, part in plan.experts.items()}
        router = self._linear(plan.router, self._products.exact)
        return self._backend.experts(config.experts, router, experts)

    def _mlp(self, plan: MlpPlan, config: MlpConfig) -> Mlp:
        make = self._products.projection
        gate_up, down = self._linear(plan.gate_up, make), self._linear(plan.down, make)
        return self._backend.mlp(gate_up, down, config)

    def _unembedding(self, embedding: Tensor) -> Unembedding:
        plan, config = self._plan.head(), self._config
        exact, make = self._products.exact, self._products.unembedding
        if config.tie_word_embeddings:
            biases = [self._tensor(source) for source in plan.unembedding.biases]
            weight = self._matrix(plan.unembedding.weights[0])
            if isinstance(weight, Tensor):
                weight = embedding  # not kept twice
            with _naming(plan.unembedding, [weight]):
                product = make(weight, _stack(biases))
        else:
            product = self._linear(plan.unembedding, make)
        return Unembedding(
            product=product,
            vocab_size=config.vocab_size,
            width=self._shard.padded_width(config.vocab_size),
            group=self._group,
            projection=self._linear(plan.projection, exact) if plan.projection else None,
            scale=config.logit_scale,
            soft_cap=config.logit_soft_cap,
        )

    def _norm(self, plan: NormPlan, config: NormConfig, readers: Sequence[Linear] = ()) -> Norm:
        return self._backend.norm(config, *self._norm_weights(plan), readers)

    def _qk_norm(self, plan: NormPlan | None, width: int) -> Norm | None:
        qk_norm = self._config.attention.qk_norm
        if plan is None or qk_norm is None:
            return None
        weight, bias = self._norm_weights(plan)
        if qk_norm.over == "all" and self._group.size > 1:
            assert weight is not None
            return SplitRmsNorm(weight, qk_norm.norm.eps, width, self._group)
        return self._backend.norm(qk_norm.norm, weight, bias)

    def _norm_weights(self, plan: NormPlan) -> tuple[Tensor | None, Tensor | None]:
        weights = [self._tensor(source) for source in plan.weights]
        weight = torch.stack(weights) if len(weights) > 1 else weights[0] if weights else None
        return weight, None if plan.bias is None else self._tensor(plan.bias)

    def _linear(self, plan: ProjectionPlan, make: MakeLinear) -> Linear:
        """One product of all matrices, or one of each where they are not quantised alike."""
        weights = [self._matrix(source) for source in plan.weights]
        biases = [self._tensor(source) for source in plan.biases]
        with _naming(plan, weights):
            if can_stack(weights):
                return make(stack_rows(weights), _stack(biases))
            each: Sequence[Tensor | None] = biases or [None] * len(weights)
            return ConcatLinear([make(w, b) for w, b in zip(weights, each, strict=True)])

    def _matrix(self, source: MatrixSource) -> Weight:
        return self._weights.matrix(source, self._dtype).to(self._device)

    def _tensor(self, source: TensorSource) -> Tensor:
        return self._weights.tensor(source, self._dtype).to(self._device)

    def _rotary(self, rope: RopeConfig, context: int) -> Rotary:
        if rope not in self._rotaries:
            make = self._backend.rotary
            self._rotaries[rope] = make(rope, context, self._dtype, self._device)
        return self._rotaries[rope]


@contextmanager
def _naming(plan: ProjectionPlan, weights: Sequence[Weight]) -> Iterator[None]:
    """What a product will not be made of is an error about a tensor: the first whose numbers are
    not all finite, else the first.
    """
    try:
        yield
    except ValueError as error:
        at_fault = plan.weights[0]
        for source, weight in zip(plan.weights, weights, strict=True):
            if isinstance(weight, Tensor) and not weight.isfinite().all():
                at_fault = source
                break
        raise CheckpointError(f"tensor {at_fault.name!r}: {error}") from error


def _stack(biases: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(biases)) if biases else None
