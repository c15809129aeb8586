"""Gemma 3, its text part: Gemma 2's layers with normalised queries and keys instead of soft caps,
five sliding layers to each that sees everything, and a rope for each of both kinds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import LayerConfig, ModelConfig, QkNormConfig
from splitserve.models.families import gemma2
from splitserve.models.families.reading import read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.rope import RopeConfig

NAMES: Final = replace(gemma2.NAMES, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

# Where image and text are one model, this is the text's part of it.
NESTED_NAMES: Final = replace(
    NAMES,
    embedding="language_model.model.embed_tokens",
    layer="language_model.model.layers.{}.",
    final_norm="language_model.model.norm",
    unembedding="language_model.lm_head",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    if "attn_logit_softcapping" in fields:
        raise fields.error("attn_logit_softcapping", "is not supported")
    # The defaults matter: published files leave out what is equal to them.
    fields = fields.defaulting(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
    )
    base = gemma2.read_capped(fields, _layers(fields))
    return replace(
        base,
        architecture="Gemma3ForCausalLM",
        names=NAMES,
        # What a scaling stretches the model to, not from.
        max_context_tokens=fields.integer("max_position_embeddings"),
        attention=replace(base.attention, qk_norm=QkNormConfig(base.norm)),
    )


def read_nested(fields: Fields) -> ModelConfig:
    """From the config.json of a model of images and text."""
    return replace(
        read(fields.nested("text_config")),
        architecture="Gemma3ForConditionalGeneration",
        names=NESTED_NAMES,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


def _layers(fields: Fields) -> tuple[LayerConfig, ...]:
    pattern = fields.integer("sliding_window_pattern", 6)
    if pattern < 1:
        raise fields.error("sliding_window_pattern", f"is {pattern}, must be at least 1")
    local, everywhere = _ropes(fields)
    window = fields.integer("sliding_window", 4096)
    layers = read_layers(fields, local, window=window, pattern=pattern)
    return tuple(layer if layer.window else replace(layer, rope=everywhere) for layer in layers)


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that slide and of those that do not. Only the latter are ever scaled in files
    that have `rope_scaling`.
    """
    size = fields.integer("head_dim")
    local_theta = fields.number("rope_local_base_freq", 10000.0)
    local = RopeConfig(local_theta, size)
    if "rope_parameters" in fields:
        local = read_rope(fields, size, theta=local_theta, layer_type="sliding_attention")
    everywhere = read_rope(fields, size, theta=1_000_000.0, layer_type="full_attention")
    return local, everywhere


FAMILY: Final = Family("Gemma 3 (text)", ("Gemma3ForCausalLM",), read)
NESTED: Final = Family(
    "Gemma 3 (multimodal, text)", ("Gemma3ForConditionalGeneration",), read_nested
)
