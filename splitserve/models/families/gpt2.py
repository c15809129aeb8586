"""GPT-2, and Cerebras-GPT, which publishes GPT-3's dense architecture in its form."""

from __future__ import annotations

from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionsConfig,
    like_layers,
)
from splitserve.models.families.reading import read_activation, read_head_dim
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{}.",
    norms=BlockNorms(attention_input="ln_1", mlp_input="ln_2"),
    qkv=("attn.c_attn",),
    qkv_order="stacked",
    transposed=True,
    attention_out="attn.c_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields.expect("add_cross_attention", False)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    head_dim = read_head_dim(fields, "n_embd", "n_head")
    positions = fields.integer("n_positions")
    return ModelConfig(
        architecture="GPT2LMHeadModel",
        names=NAMES,
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=positions,
        norm=NormConfig("layer", fields.number("layer_norm_epsilon", 1e-5), has_bias=True),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            scale=0.0 if fields.boolean("scale_attn_weights", True) else 1.0,
            qkv_bias=True,
            out_bias=True,
        ),
        mlp=MlpConfig(
            fields.integer("n_inner", 4 * hidden),
            read_activation(fields, "activation_function", "gelu_new"),
            gated=False,
            bias=True,
            down_bias=True,
        ),
        layers=like_layers(fields.integer("n_layer"), LayerConfig()),
        positions=PositionsConfig(positions),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


FAMILY: Final = Family("GPT-2, Cerebras-GPT", ("GPT2LMHeadModel",), read)
