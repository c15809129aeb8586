"""OPT, and Galactica in its form: learned positions, ReLU, norms before or after each part."""

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
    PositionsConfig,
    like_layers,
)
from splitserve.models.families.reading import read_activation, read_head_dim
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms, Names

NAMES: Final = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layer="model.decoder.layers.{}.",
    norms=BlockNorms(attention_input="self_attn_layer_norm", mlp_input="final_layer_norm"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
    final_norm="model.decoder.final_layer_norm",
)

_NORMS_AFTER: Final = BlockNorms(
    after_attention="self_attn_layer_norm", after_mlp="final_layer_norm"
)

# Rows of the table of positions before that of position 0, from the padding of fairseq.
_POSITION_OFFSET: Final = 2


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields.expect("scale_embeddings", False)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    width = fields.integer("word_embed_proj_dim", hidden)
    positions = fields.integer("max_position_embeddings", 2048)
    bias = fields.boolean("enable_bias", True)
    affine = fields.boolean("layer_norm_elementwise_affine", True)
    return ModelConfig(
        architecture="OPTForCausalLM",
        names=_names(fields, projected=width != hidden),
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=positions,
        norm=NormConfig("layer", 1e-5, has_bias=affine, has_weight=affine),
        attention=AttentionConfig(
            heads, heads, read_head_dim(fields), qkv_bias=bias, out_bias=bias
        ),
        mlp=MlpConfig(
            fields.integer("ffn_dim"),
            read_activation(fields, "activation_function", "relu"),
            gated=False,
            bias=bias,
            down_bias=bias,
        ),
        layers=like_layers(fields.integer("num_hidden_layers"), LayerConfig()),
        positions=PositionsConfig(positions + _POSITION_OFFSET, _POSITION_OFFSET),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_size=width if width != hidden else 0,
    )


def _names(fields: Fields, *, projected: bool) -> Names:
    names = NAMES
    if projected:
        names = replace(
            names,
            embedding_in="model.decoder.project_in",
            embedding_out="model.decoder.project_out",
        )
    if not fields.boolean("do_layer_norm_before", True):
        return replace(names, norms=_NORMS_AFTER, final_norm=None)
    if fields.boolean("_remove_final_layer_norm", False):
        return replace(names, final_norm=None)
    return names


FAMILY: Final = Family("OPT, Galactica", ("OPTForCausalLM",), read)
