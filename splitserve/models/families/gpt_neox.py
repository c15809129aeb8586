"""GPT-NeoX and Pythia: attention and MLP side by side, a quarter of each head turned."""

from __future__ import annotations

from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import AttentionConfig, MlpConfig, ModelConfig, NormConfig
from splitserve.models.families.reading import (
    read_activation,
    read_head_dim,
    read_layers,
    read_rope,
)
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="gpt_neox.embed_in",
    layer="gpt_neox.layers.{}.",
    norms=BlockNorms(attention_input="input_layernorm", mlp_input="post_attention_layernorm"),
    qkv=("attention.query_key_value",),
    qkv_order="grouped",
    attention_out="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    unembedding="embed_out",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    heads, head_dim = fields.integer("num_attention_heads"), read_head_dim(fields)
    partial, bias = fields.number("rotary_pct", 0.25), fields.boolean("attention_bias", True)
    theta = fields.number("rotary_emb_base", 10000.0)
    return ModelConfig(
        architecture="GPTNeoXForCausalLM",
        names=NAMES,
        hidden_size=fields.integer("hidden_size"),
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_position_embeddings"),
        norm=NormConfig("layer", fields.number("layer_norm_eps", 1e-5), has_bias=True),
        attention=AttentionConfig(heads, heads, head_dim, qkv_bias=bias, out_bias=bias),
        mlp=MlpConfig(
            fields.integer("intermediate_size"),
            read_activation(fields, "hidden_act", "gelu"),
            gated=False,
            bias=True,
            down_bias=True,
        ),
        layers=read_layers(fields, read_rope(fields, head_dim, theta=theta, partial=partial)),
        parallel=fields.boolean("use_parallel_residual", True),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
    )


FAMILY: Final = Family("GPT-NeoX, Pythia", ("GPTNeoXForCausalLM",), read)
