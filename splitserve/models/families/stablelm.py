"""StableLM: Llama's layers with mean-and-variance norms and a quarter of each head turned."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import (
    AttentionConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    QkNormConfig,
)
from splitserve.models.families import llama
from splitserve.models.families.reading import (
    read_activation,
    read_head_dim,
    read_layers,
    read_rope,
)
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    heads, head_dim = fields.integer("num_attention_heads"), read_head_dim(fields)
    eps = fields.number("layer_norm_eps", 1e-5)
    qk_norm = fields.boolean("qk_layernorm", False)
    parallel = fields.boolean("use_parallel_residual", False)
    return ModelConfig(
        architecture="StableLmForCausalLM",
        names=_names(qk_norm=qk_norm, parallel=parallel),
        hidden_size=fields.integer("hidden_size"),
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_position_embeddings", 4096),
        norm=NormConfig("layer", eps, has_bias=True),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            qkv_bias=fields.boolean("use_qkv_bias", False),
            qk_norm=QkNormConfig(NormConfig("layer", eps), "heads") if qk_norm else None,
        ),
        mlp=MlpConfig(
            fields.integer("intermediate_size"), read_activation(fields, "hidden_act", "silu")
        ),
        layers=read_layers(fields, read_rope(fields, head_dim, partial=0.25)),
        parallel=parallel,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
    )


def _names(*, qk_norm: bool, parallel: bool) -> Names:
    names = llama.NAMES
    if qk_norm:
        names = replace(
            names,
            query_norm="self_attn.q_layernorm.norms.{}",
            key_norm="self_attn.k_layernorm.norms.{}",
        )
    if parallel:
        names = replace(names, norms=BlockNorms(attention_input="input_layernorm"))
    return names


FAMILY: Final = Family("StableLM", ("StableLmForCausalLM",), read)
