"""BLOOM and BLOOMZ: ALiBi, and a norm right after the embedding."""

from __future__ import annotations

from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    like_layers,
)
from splitserve.models.families.reading import either, read_head_dim
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layer="transformer.h.{}.",
    norms=BlockNorms(attention_input="input_layernorm", mlp_input="post_attention_layernorm"),
    qkv=("self_attention.query_key_value",),
    qkv_order="grouped",
    attention_out="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json, in which three keys have two names each."""
    fields.expect("apply_residual_connection_post_layernorm", False)
    if fields.integer("pretraining_tp", 1) > 1:
        # It sums in parts and leaves the biases out.
        fields.expect("slow_but_exact", False)
    hidden_key = either(fields, "n_embed", "hidden_size")
    heads_key = either(fields, "n_head", "num_attention_heads")
    hidden, heads = fields.integer(hidden_key), fields.integer(heads_key)
    return ModelConfig(
        architecture="BloomForCausalLM",
        names=NAMES,
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        # ALiBi has no last position; this is what the models were trained on.
        max_context_tokens=fields.integer("seq_length", 2048),
        norm=NormConfig("layer", fields.number("layer_norm_epsilon", 1e-5), has_bias=True),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=read_head_dim(fields, hidden_key, heads_key),
            qkv_bias=True,
            out_bias=True,
            alibi_scale=1.0,
        ),
        mlp=MlpConfig(4 * hidden, "gelu_tanh", gated=False, bias=True, down_bias=True),
        layers=like_layers(
            fields.integer(either(fields, "n_layer", "num_hidden_layers")), LayerConfig()
        ),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


FAMILY: Final = Family("BLOOM", ("BloomForCausalLM",), read)
