"""The shape of a model, checked where it is made. Never imports torch.

A family's file fills this in from a checkpoint's config; layers are built from it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from splitserve.errors import CheckpointError
from splitserve.models.limits import check_bound, check_count, check_positive
from splitserve.models.names import Names
from splitserve.models.rope import MOST_CONTEXT, RopeConfig

# Far above any real model and far below what makes an allocation a denial of service.
MOST_WIDTH: Final = 1 << 17
_MOST_INNER: Final = 1 << 20
_MOST_LAYERS: Final = 1 << 10
_MOST_HEADS: Final = 1 << 12
_MOST_VOCAB: Final = 1 << 22
_MOST_EXPERTS: Final = 1 << 12

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "clamped_swiglu"]


@dataclass(frozen=True)
class NormConfig:
    """A norm over the last dimension: by root mean square, or by mean and variance.

    `weight_offset` is added to the stored weight (Gemma stores it less one). `fp32_weight` says
    that the weight is multiplied before the result is rounded to the model's type.
    """

    kind: Literal["rms", "layer"]
    eps: float
    has_bias: bool = False
    has_weight: bool = True
    weight_offset: float = 0.0
    fp32_weight: bool = False

    def __post_init__(self) -> None:
        check_positive("the norm's epsilon", self.eps)
        if self.eps >= 1:
            raise CheckpointError(f"the norm's epsilon is {self.eps}, must be below 1")


@dataclass(frozen=True)
class QkNormConfig:
    """A norm of queries and keys before they are turned.

    Over each head with one weight for all (`head`), over each head with a weight of its own
    (`heads`), or over all heads together (`all`).
    """

    norm: NormConfig
    over: Literal["head", "heads", "all"] = "head"


@dataclass(frozen=True)
class AttentionConfig:
    """Scaled dot-product attention, causal. `scale` multiplies scores, 0 stands for head_dim **
    -0.5. `soft_cap` bounds them by c * tanh(scores / c). `alibi_scale` multiplies ALiBi's biases
    (Press et al. 2021), None for none of them. Sinks are a learned score a head that takes
    part in the softmax and has no value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    soft_cap: float | None = None
    clip_qkv: float | None = None
    alibi_scale: float | None = None
    alibi_bias_max: float = 8.0
    qk_norm: QkNormConfig | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        check_count("num_heads", self.num_heads, _MOST_HEADS)
        check_count("num_kv_heads", self.num_kv_heads, _MOST_HEADS)
        check_count("head_dim", self.head_dim, _MOST_HEADS)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        for name in ("soft_cap", "clip_qkv", "alibi_scale", "alibi_bias_max"):
            value = getattr(self, name)
            if value is not None:
                check_bound(name, value)
        if self.scale:
            check_positive("the attention scale", self.scale)
        else:
            object.__setattr__(self, "scale", self.head_dim**-0.5)

    @property
    def query_size(self) -> int:
        """Width of all heads' queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all KV heads' keys."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class MlpConfig:
    """down(activation(gate) * up), or down(activation(up)) without a gate.

    `limit` is where `clamped_swiglu` (gpt-oss) cuts gate and up off.
    """

    size: int
    activation: Activation = "silu"
    limit: float = 7.0
    gated: bool = True
    bias: bool = False
    down_bias: bool = False

    def __post_init__(self) -> None:
        check_count("intermediate_size", self.size, _MOST_INNER)
        check_bound("swiglu_limit", self.limit)


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of `count` MLPs, of which each token goes through the `top_k` likeliest.

    `softmax` says whether probabilities are taken over all experts or only over those chosen.
    `renormalized` scales those chosen to a sum of 1.
    """

    mlp: MlpConfig
    count: int
    top_k: int
    softmax: Literal["all", "chosen"] = "all"
    renormalized: bool = True
    router_bias: bool = False

    def __post_init__(self) -> None:
        check_count("num_experts", self.count, _MOST_EXPERTS)
        check_count("num_experts_per_tok", self.top_k, self.count)


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer. `window` is how many tokens a query sees, itself
    included; None for all.
    """

    window: int | None = None
    rope: RopeConfig | None = None
    has_experts: bool = False

    def __post_init__(self) -> None:
        if self.window is not None:
            check_count("sliding_window", self.window, MOST_CONTEXT)


@dataclass(frozen=True)
class PositionsConfig:
    """Learned positions: position p is row p + `offset` of `rows`."""

    rows: int
    offset: int = 0

    def __post_init__(self) -> None:
        check_count("position embeddings", self.rows, MOST_CONTEXT)


@dataclass(frozen=True)
class ModelConfig:
    """One model. Raises `CheckpointError` for what no model can have; the reader of a file adds
    the file's name.

    `parallel` computes attention and MLP from the same input. `embedding_size` is that of a
    smaller embedding with projections in and out of it, 0 for none. `embedding_scale` multiplies
    embeddings, `logit_scale` logits; `logit_soft_cap` bounds these.
    """

    architecture: str
    names: Names
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    norm: NormConfig
    attention: AttentionConfig
    layers: tuple[LayerConfig, ...]
    mlp: MlpConfig | None = None
    experts: ExpertsConfig | None = None
    parallel: bool = False
    positions: PositionsConfig | None = None
    tie_word_embeddings: bool = False
    unembedding_bias: bool = False
    embedding_size: int = 0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_count("hidden_size", self.hidden_size, MOST_WIDTH)
        check_count("vocab_size", self.vocab_size, _MOST_VOCAB)
        check_count("max_context_tokens", self.max_context_tokens, MOST_CONTEXT)
        check_count("num_layers", len(self.layers), _MOST_LAYERS)
        if self.embedding_size:
            check_count("embedding_size", self.embedding_size, MOST_WIDTH)
        check_bound("the scale of embeddings", self.embedding_scale)
        check_bound("logit_scale", self.logit_scale)
        if self.logit_soft_cap is not None:
            check_bound("final_logit_softcapping", self.logit_soft_cap)
        self._check_layers()
        self._check_token_ids()

    @property
    def num_layers(self) -> int:
        """How many layers."""
        return len(self.layers)

    def _check_layers(self) -> None:
        for layer in self.layers:
            if layer.rope and layer.rope.dims > self.attention.head_dim:
                raise CheckpointError(
                    f"rotary embedding of {layer.rope.dims} dimensions, "
                    f"head_dim is {self.attention.head_dim}"
                )
            if (self.experts if layer.has_experts else self.mlp) is None:
                raise CheckpointError("a layer has neither an MLP nor experts")

    def _check_token_ids(self) -> None:
        ids = set(self.eos_token_ids)
        if self.bos_token_id is not None:
            ids.add(self.bos_token_id)
        for token_id in sorted(ids):
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"bos or eos token {token_id} is outside the vocabulary of {self.vocab_size}"
                )


def num_layers(count: int) -> range:
    """Layer numbers, for building `layers`. Raises `CheckpointError` for an absurd count."""
    check_count("num_layers", count, _MOST_LAYERS)
    return range(count)


def like_layers(count: int, layer: LayerConfig) -> tuple[LayerConfig, ...]:
    """So many layers, all alike."""
    return tuple(layer for _ in num_layers(count))
