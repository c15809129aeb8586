"""StarCoder2: Llama's attention with biases and a sliding window, GPT-2's MLP and norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import AttentionConfig, MlpConfig, ModelConfig, NormConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import (
    read_activation,
    read_head_dim,
    read_layers,
    read_rope,
)
from splitserve.models.family import Family

NAMES: Final = replace(llama.NAMES, gate_up=("mlp.c_fc",), down="mlp.c_proj")


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields.expect("norm_type", "layer_norm")
    fields.expect("mlp_type", "default")
    head_dim, bias = read_head_dim(fields), fields.boolean("use_bias", True)
    window = fields.optional_integer("sliding_window")
    return ModelConfig(
        architecture="Starcoder2ForCausalLM",
        names=NAMES,
        hidden_size=fields.integer("hidden_size"),
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_position_embeddings", 4096),
        norm=NormConfig("layer", fields.number("norm_epsilon", 1e-5), has_bias=True),
        attention=AttentionConfig(
            num_heads=fields.integer("num_attention_heads"),
            num_kv_heads=fields.integer("num_key_value_heads", 2),
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=MlpConfig(
            fields.integer("intermediate_size"),
            read_activation(fields, "hidden_act", "gelu_pytorch_tanh"),
            gated=False,
            bias=bias,
            down_bias=bias,
        ),
        layers=read_layers(fields, read_rope(fields, head_dim), window=window),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


FAMILY: Final = Family("StarCoder2", ("Starcoder2ForCausalLM",), read)
