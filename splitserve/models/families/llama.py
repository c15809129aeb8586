"""Llama 1, 2 and 3.x."""

from __future__ import annotations

from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig
from splitserve.models.families.reading import (
    read_activation,
    read_context,
    read_head_dim,
    read_layers,
    read_rope,
    rms_norm,
)
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="model.embed_tokens",
    layer="model.layers.{}.",
    norms=BlockNorms(attention_input="input_layernorm", mlp_input="post_attention_layernorm"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    final_norm="model.norm",
)


def read(fields: Fields, layers: tuple[LayerConfig, ...] = ()) -> ModelConfig:
    """From config.json. `layers` are those of a relative that reads them in its own way."""
    num_heads = fields.integer("num_attention_heads")
    head_dim = read_head_dim(fields)
    layers = layers or read_layers(fields, read_rope(fields, head_dim))
    attention_bias, mlp_bias = (
        fields.boolean("attention_bias", False),
        fields.boolean("mlp_bias", False),
    )
    return ModelConfig(
        architecture="LlamaForCausalLM",
        names=NAMES,
        hidden_size=fields.integer("hidden_size"),
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=read_context(fields, layers[0].rope),
        norm=rms_norm(fields),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            qkv_bias=attention_bias,
            out_bias=attention_bias,
        ),
        mlp=MlpConfig(
            fields.integer("intermediate_size"),
            read_activation(fields, "hidden_act", "silu"),
            bias=mlp_bias,
            down_bias=mlp_bias,
        ),
        layers=layers,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
    )


FAMILY: Final = Family("Llama 1, 2 and 3", ("LlamaForCausalLM",), read)
