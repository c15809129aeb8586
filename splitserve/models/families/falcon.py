"""Falcon: three generations of one family, told apart by flags.

RW has ALiBi, biases and layers in sequence. 7B has one KV head and attention and MLP side by
side after one norm. 40B, 180B and Falcon 2 have grouped KV heads, side by side after two norms
or after one.
"""

from __future__ import annotations

from dataclasses import replace
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
from splitserve.models.families.reading import (
    either,
    read_activation,
    read_head_dim,
    read_rope,
)
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="transformer.word_embeddings",
    layer="transformer.h.{}.",
    norms=BlockNorms(attention_input="input_layernorm"),
    qkv=("self_attention.query_key_value",),
    qkv_order="grouped",
    attention_out="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
)

_TWO_NORMS: Final = BlockNorms(attention_input="ln_attn", mlp_input="ln_mlp")
_SEQUENTIAL: Final = BlockNorms(
    attention_input="input_layernorm", mlp_input="post_attention_layernorm"
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields.expect("apply_residual_connection_post_layernorm", False)
    hidden_key = either(fields, "n_embed", "hidden_size")
    hidden, bias = fields.integer(hidden_key), fields.boolean("bias", False)
    head_dim = read_head_dim(fields, hidden_key)
    alibi = fields.boolean("alibi", False)
    parallel = fields.boolean("parallel_attn", True)
    return ModelConfig(
        architecture="FalconForCausalLM",
        names=replace(NAMES, norms=_norms(fields, parallel=parallel)),
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_position_embeddings", 2048),
        norm=NormConfig("layer", fields.number("layer_norm_epsilon", 1e-5), has_bias=True),
        attention=AttentionConfig(
            num_heads=fields.integer("num_attention_heads"),
            num_kv_heads=_num_kv_heads(fields),
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
            # Biases are added before scores are scaled. transformers rounds them to bf16, which
            # shows from position 256 on, or where the number of heads is no power of two.
            alibi_scale=head_dim**-0.5 if alibi else None,
        ),
        mlp=MlpConfig(
            fields.integer("ffn_hidden_size", 4 * hidden),
            read_activation(fields, "activation", "gelu"),
            gated=False,
            bias=bias,
            down_bias=bias,
        ),
        layers=like_layers(
            fields.integer("num_hidden_layers"),
            LayerConfig(rope=None if alibi else read_rope(fields, head_dim)),
        ),
        parallel=parallel,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


def _is_new(fields: Fields) -> bool:
    return fields.boolean("new_decoder_architecture", False)


def _num_kv_heads(fields: Fields) -> int:
    heads = fields.integer("num_attention_heads")
    if _is_new(fields):
        return fields.integer("num_kv_heads", heads)
    return 1 if fields.boolean("multi_query", True) else heads


def _norms(fields: Fields, *, parallel: bool) -> BlockNorms:
    if not _is_new(fields):
        fields.expect("num_ln_in_parallel_attn", 1)
        return NAMES.norms if parallel else _SEQUENTIAL
    fields.expect("parallel_attn", True)
    match fields.integer("num_ln_in_parallel_attn", 2):
        case 1:
            return NAMES.norms
        case 2:
            return _TWO_NORMS
        case count:
            raise fields.error("num_ln_in_parallel_attn", f"is {count}, supported: 1, 2")


FAMILY: Final = Family("Falcon", ("FalconForCausalLM",), read, ships_code=True)
