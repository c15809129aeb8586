"""MPT: ALiBi, norms without biases and, in some, clipped queries, keys and values."""

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
from splitserve.models.families.reading import read_head_dim
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="transformer.wte",
    layer="transformer.blocks.{}.",
    norms=BlockNorms(attention_input="norm_1", mlp_input="norm_2"),
    qkv=("attn.Wqkv",),
    qkv_order="stacked",
    attention_out="attn.out_proj",
    gate_up=("ffn.up_proj",),
    down="ffn.down_proj",
    final_norm="transformer.norm_f",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields.expect("norm_type", "low_precision_layernorm", "layernorm")
    if "logit_scale" in fields:
        raise fields.error("logit_scale", "is not supported")
    hidden = fields.integer("d_model")
    biased = not fields.boolean("no_bias", True)
    return ModelConfig(
        architecture="MptForCausalLM",
        names=NAMES,
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_seq_len", 2048),
        norm=NormConfig("layer", fields.number("layer_norm_epsilon", 1e-5), has_bias=biased),
        attention=_attention(fields, biased=biased),
        mlp=MlpConfig(
            fields.integer("expansion_ratio", 4) * hidden,
            "gelu",
            gated=False,
            bias=biased,
            down_bias=biased,
        ),
        layers=like_layers(fields.integer("n_layers"), LayerConfig()),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


def _attention(fields: Fields, *, biased: bool) -> AttentionConfig:
    attention, heads = fields.nested("attn_config"), fields.integer("n_heads")
    attention.expect("attn_type", "multihead_attention")
    # Without ALiBi a model has learned positions, which transformers does not implement.
    attention.expect("alibi", True)
    for key in ("qk_ln", "qk_gn", "prefix_lm", "attn_uses_sequence_id", "rope"):
        attention.expect(key, False)
    attention.expect("sliding_window_size", -1)
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=read_head_dim(fields, "d_model", "n_heads"),
        scale=attention.number("softmax_scale", 0.0),
        qkv_bias=biased,
        out_bias=biased,
        # 0, too, stands for no clipping.
        clip_qkv=attention.number("clip_qkv", 0.0) or None,
        alibi_scale=1.0,
        alibi_bias_max=attention.number("alibi_bias_max", 8.0),
    )


FAMILY: Final = Family("MPT", ("MptForCausalLM", "MPTForCausalLM"), read, ships_code=True)
