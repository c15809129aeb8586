"""Plans which tensors a rank of a model reads. Never imports torch.

Loading reads what is planned here; `splitserve models` checks it against a checkpoint's headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from splitserve.models.config import MlpConfig, ModelConfig, NormConfig
from splitserve.models.names import BlockNorms, ExpertNames
from splitserve.models.plan import (
    EmbeddingPlan,
    ExpertsPlan,
    HeadPlan,
    LayerPlan,
    MlpPlan,
    NormPlan,
    ProjectionPlan,
)
from splitserve.parallel.shard import Shard
from splitserve.weights.source import MatrixSource, TensorSource

Spans: TypeAlias = tuple[range, ...]


class ModelPlanner:
    """A rank's part of a model, layer by layer.

    Biases of products that are summed over ranks are rank 0's alone.
    """

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        """Raises `CheckpointError` or `ConfigError` if the model does not divide so."""
        self.config = config
        self.shard = shard
        attention = config.attention
        self._queries = shard.query_heads(attention.num_heads, attention.num_kv_heads)
        self._kv = shard.kv_heads(attention.num_kv_heads)
        self._vocab = shard.padded_span(config.vocab_size)

    @property
    def heads(self) -> range:
        """Query heads of this rank, by number."""
        return self._queries

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return len(self._queries)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return len(self._kv)

    @property
    def vocab(self) -> range:
        """Token ids whose embedding and logit are this rank's."""
        return self._vocab

    def embedding(self) -> EmbeddingPlan:
        """See `EmbeddingPlan`."""
        config, names = self.config, self.config.names
        width = config.embedding_size or config.hidden_size
        positions = None
        if config.positions and names.positions:
            shape = (config.positions.rows, config.hidden_size)
            positions = TensorSource(f"{names.positions}.weight", shape)
        projection = None
        if names.embedding_in:
            projection = _whole(f"{names.embedding_in}.weight", (config.hidden_size, width))
        tokens = f"{names.embedding}.weight"
        return EmbeddingPlan(
            tokens=TensorSource(tokens, (config.vocab_size, width), (self._vocab,)),
            positions=positions,
            norm=_norm(names.embedding_norm, config.norm, config.hidden_size),
            projection=projection,
        )

    def head(self) -> HeadPlan:
        """See `HeadPlan`."""
        config, names = self.config, self.config.names
        width = config.embedding_size or config.hidden_size
        name = names.embedding if config.tie_word_embeddings else names.unembedding
        biases: tuple[TensorSource, ...] = ()
        if config.unembedding_bias:
            biases = (
                TensorSource(f"{names.unembedding}.bias", (config.vocab_size,), (self._vocab,)),
            )
        projection = None
        if names.embedding_out:
            projection = _whole(f"{names.embedding_out}.weight", (width, config.hidden_size))
        weight = MatrixSource(f"{name}.weight", (config.vocab_size, width), (self._vocab,))
        return HeadPlan(
            norm=_norm(names.final_norm, config.norm, config.hidden_size),
            projection=projection,
            unembedding=ProjectionPlan((weight,), biases),
        )

    def layer(self, index: int) -> LayerPlan:
        """See `LayerPlan`."""
        config, names = self.config, self.config.names
        prefix = names.layer.format(index)
        norms = {}
        for slot in BlockNorms.__dataclass_fields__:
            norm = _norm(
                _within(prefix, getattr(names.norms, slot)), config.norm, config.hidden_size
            )
            if norm:
                norms[slot] = norm
        sinks = None
        if names.sinks:
            heads = config.attention.num_heads
            sinks = TensorSource(prefix + names.sinks, (heads,), (self._queries,))
        return LayerPlan(
            norms=norms,
            qkv=self._qkv(prefix),
            attention_out=self._attention_out(prefix),
            query_norm=self._qk_norm(_within(prefix, names.query_norm), self._queries),
            key_norm=self._qk_norm(_within(prefix, names.key_norm), self._kv),
            sinks=sinks,
            mlp=self._experts(prefix) if config.layers[index].has_experts else self._mlp(prefix),
        )

    def sources(self) -> Iterator[TensorSource | MatrixSource]:
        """Everything that is read, in the order of loading."""
        yield from _sources(self.embedding())
        for index in range(self.config.num_layers):
            yield from _sources(self.layer(index))
        yield from _sources(self.head())

    def _qkv(self, prefix: str) -> ProjectionPlan:
        config, names = self.config, self.config.names
        attention, width = config.attention, config.hidden_size
        size = attention.head_dim
        queries, keys = _spread(self._queries, size), _spread(self._kv, size)
        if names.qkv_order == "apart":
            rows: list[tuple[int, Spans]] = [
                (attention.query_size, (queries,)),
                (attention.kv_size, (keys,)),
                (attention.kv_size, (keys,)),
            ]
        else:
            total = attention.query_size + 2 * attention.kv_size
            stacked = names.qkv_order == "stacked"
            rows = [(total, self._stacked_rows() if stacked else self._grouped_rows())]
        return _projection(
            [prefix + name for name in names.qkv],
            rows,
            width,
            has_bias=attention.qkv_bias,
            transposed=names.transposed,
        )

    def _stacked_rows(self) -> Spans:
        """This rank's queries, keys and values where all queries come first, then all keys."""
        attention = self.config.attention
        keys = _spread(self._kv, attention.head_dim)
        first_key, first_value = attention.query_size, attention.query_size + attention.kv_size
        return (
            _spread(self._queries, attention.head_dim),
            _moved(keys, first_key),
            _moved(keys, first_value),
        )

    def _grouped_rows(self) -> Spans:
        """The same where each KV head has its queries, its key and its value together."""
        attention, size = self.config.attention, self.config.attention.head_dim
        group = attention.num_heads // attention.num_kv_heads

        def head_rows(kv_head: int, place: int) -> range:
            return _spread(range(1), size, start=(kv_head * (group + 2) + place) * size)

        queries = [head_rows(head // group, head % group) for head in self._queries]
        keys = [head_rows(head, group) for head in self._kv]
        values = [head_rows(head, group + 1) for head in self._kv]
        return (*queries, *keys, *values)

    def _attention_out(self, prefix: str) -> ProjectionPlan:
        config, attention = self.config, self.config.attention
        return self._summed(
            prefix + config.names.attention_out,
            (config.hidden_size, attention.query_size),
            _spread(self._queries, attention.head_dim),
            has_bias=attention.out_bias,
        )

    def _summed(
        self, name: str, shape: tuple[int, int], columns: range, *, has_bias: bool
    ) -> ProjectionPlan:
        """A product of which each rank has the columns that meet its own part of the input."""
        taken = None if len(columns) == shape[1] else columns
        transposed = self.config.names.transposed
        weight = MatrixSource(f"{name}.weight", shape, None, taken, transposed)
        biased = has_bias and self.shard.rank == 0
        return ProjectionPlan(
            (weight,), (TensorSource(f"{name}.bias", (shape[0],)),) if biased else ()
        )

    def _mlp(self, prefix: str) -> MlpPlan:
        config, names = self.config, self.config.names
        mlp = config.mlp
        assert mlp is not None  # ModelConfig has checked it
        span = self.shard.span(mlp.size, "intermediate_size")
        gate_up = _projection(
            [prefix + name for name in names.gate_up],
            _gate_up_rows(mlp, len(names.gate_up), span),
            config.hidden_size,
            has_bias=mlp.bias,
            transposed=names.transposed,
        )
        down = self._summed(
            prefix + names.down, (config.hidden_size, mlp.size), span, has_bias=mlp.down_bias
        )
        return MlpPlan(gate_up, down)

    def _experts(self, prefix: str) -> ExpertsPlan:
        config, experts, names = self.config, self.config.experts, self.config.names.experts
        assert experts is not None  # ModelConfig has checked it
        assert names is not None
        router = _whole(f"{prefix}{names.router}.weight", (experts.count, config.hidden_size))
        if experts.router_bias:
            bias = TensorSource(f"{prefix}{names.router}.bias", (experts.count,))
            router = ProjectionPlan(router.weights, (bias,))
        mine = self.shard.share(experts.count)
        return ExpertsPlan(router, {index: self._expert(prefix, names, index) for index in mine})

    def _expert(self, prefix: str, names: ExpertNames, index: int) -> MlpPlan:
        config, experts = self.config, self.config.experts
        assert experts is not None
        mlp, hidden = experts.mlp, config.hidden_size
        rows = _gate_up_rows(mlp, len(names.gate_up), range(mlp.size))

        def one(
            name: str, shape: tuple[int, int], taken: Spans | None, bias: bool
        ) -> ProjectionPlan:
            if "{}" in name:
                full = prefix + name.format(index)
                weight = MatrixSource(f"{full}.weight", shape, taken)
                biases = TensorSource(f"{full}.bias", shape[:1], taken)
            else:
                full = prefix + name
                weight = MatrixSource(
                    full, shape, taken, None, names.transposed, index, experts.count
                )
                biases = TensorSource(f"{full}_bias", shape[:1], taken, index, experts.count)
            return ProjectionPlan((weight,), (biases,) if bias else ())

        parts = [
            one(name, (height, hidden), taken, mlp.bias)
            for name, (height, taken) in zip(names.gate_up, rows, strict=True)
        ]
        gate_up = ProjectionPlan(
            tuple(part.weights[0] for part in parts), tuple(b for p in parts for b in p.biases)
        )
        return MlpPlan(gate_up, one(names.down, (hidden, mlp.size), None, mlp.down_bias))

    def _qk_norm(self, name: str | None, heads: range) -> NormPlan | None:
        attention = self.config.attention
        if name is None or attention.qk_norm is None:
            return None
        qk_norm, size = attention.qk_norm, attention.head_dim
        total = attention.num_heads if heads is self._queries else attention.num_kv_heads
        if "{}" in name:
            each = [_norm(name.format(head), qk_norm.norm, size) for head in heads]
            return NormPlan(tuple(norm.weights[0] for norm in each if norm), None)
        match qk_norm.over:
            case "head":
                return _norm(name, qk_norm.norm, size)
            case "heads":
                source = TensorSource(f"{name}.weight", (total, size), (heads,))
            case "all":
                source = TensorSource(f"{name}.weight", (total * size,), (_spread(heads, size),))
        return NormPlan((source,), None)


def _projection(
    names: list[str],
    rows: list[tuple[int, Spans]],
    width: int,
    *,
    has_bias: bool,
    transposed: bool = False,
) -> ProjectionPlan:
    """`rows` has each matrix's height and the rows of it that are taken."""
    weights, biases = [], []
    for name, (height, taken) in zip(names, rows, strict=True):
        spans = None if taken == (range(height),) else taken
        weights.append(MatrixSource(f"{name}.weight", (height, width), spans, None, transposed))
        if has_bias:
            biases.append(TensorSource(f"{name}.bias", (height,), spans))
    return ProjectionPlan(tuple(weights), tuple(biases))


def _gate_up_rows(mlp: MlpConfig, num_matrices: int, span: range) -> list[tuple[int, Spans]]:
    if num_matrices == 2:
        return [(mlp.size, (span,)), (mlp.size, (span,))]
    if mlp.gated:
        return [(2 * mlp.size, (span, _moved(span, mlp.size)))]
    return [(mlp.size, (span,))]


def _whole(name: str, shape: tuple[int, int]) -> ProjectionPlan:
    return ProjectionPlan((MatrixSource(name, shape),))


def _norm(name: str | None, norm: NormConfig, size: int) -> NormPlan | None:
    if name is None:
        return None
    weights = (TensorSource(f"{name}.weight", (size,)),) if norm.has_weight else ()
    return NormPlan(weights, TensorSource(f"{name}.bias", (size,)) if norm.has_bias else None)


def _within(prefix: str, name: str | None) -> str | None:
    return None if name is None else prefix + name


def _spread(heads: range, size: int, start: int = 0) -> range:
    """Rows of consecutive heads of `size` rows each."""
    return range(start + heads.start * size, start + heads.stop * size)


def _moved(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


def _sources(plan: object) -> Iterator[TensorSource | MatrixSource]:
    """All sources within a plan, fields in their order."""
    if isinstance(plan, TensorSource | MatrixSource):
        yield plan
    elif isinstance(plan, dict | tuple):
        for part in plan.values() if isinstance(plan, dict) else plan:
            yield from _sources(part)
    elif hasattr(plan, "__dataclass_fields__"):
        for name in plan.__dataclass_fields__:
            yield from _sources(getattr(plan, name))
