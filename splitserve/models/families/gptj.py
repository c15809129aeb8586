"""GPT-J: attention and MLP side by side after one norm, neighbouring dimensions turned."""

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
from splitserve.models.families.reading import read_activation, read_head_dim
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names
from splitserve.models.rope import RopeConfig

NAMES: Final = Names(
    embedding="transformer.wte",
    layer="transformer.h.{}.",
    norms=BlockNorms(attention_input="ln_1"),
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_out="attn.out_proj",
    gate_up=("mlp.fc_in",),
    down="mlp.fc_out",
    final_norm="transformer.ln_f",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    rope = RopeConfig(10000.0, fields.integer("rotary_dim", 64), interleaved=True)
    return ModelConfig(
        architecture="GPTJForCausalLM",
        names=NAMES,
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("n_positions", 2048),
        norm=NormConfig("layer", fields.number("layer_norm_epsilon", 1e-5), has_bias=True),
        attention=AttentionConfig(heads, heads, read_head_dim(fields, "n_embd", "n_head")),
        mlp=MlpConfig(
            fields.integer("n_inner", 4 * hidden),
            read_activation(fields, "activation_function", "gelu_new"),
            gated=False,
            bias=True,
            down_bias=True,
        ),
        layers=like_layers(fields.integer("n_layer"), LayerConfig(rope=rope)),
        parallel=True,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        unembedding_bias=True,
    )


FAMILY: Final = Family("GPT-J", ("GPTJForCausalLM",), read)
