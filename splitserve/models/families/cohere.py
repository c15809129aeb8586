"""Cohere's Command R and R+, and Command R7B, most of whose layers slide and whose others have no
positions: attention and MLP side by side, one layer norm without a bias, neighbours turned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import LayerConfig, ModelConfig, NormConfig, QkNormConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms

NAMES: Final = replace(llama.NAMES, norms=BlockNorms(attention_input="input_layernorm"))


def _read(fields: Fields, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    norm = NormConfig("layer", fields.number("layer_norm_eps", 1e-5), fp32_weight=True)
    return replace(
        llama.read(fields.defaulting(tie_word_embeddings=True), layers),
        names=NAMES,
        norm=norm,
        parallel=True,
        logit_scale=fields.number("logit_scale", 0.0625),
    )


def read(fields: Fields) -> ModelConfig:
    """From Command R's config.json."""
    rope = read_rope(fields, read_head_dim(fields), theta=500_000.0, interleaved=True)
    base = _read(fields, read_layers(fields, rope))
    base = replace(base, architecture="CohereForCausalLM")
    if not fields.boolean("use_qk_norm", False):
        return base
    return replace(
        base,
        names=replace(NAMES, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        attention=replace(base.attention, qk_norm=QkNormConfig(base.norm, over="heads")),
    )


def read_sliding(fields: Fields) -> ModelConfig:
    """From Command R7B's config.json."""
    rope = read_rope(fields, read_head_dim(fields), interleaved=True)
    pattern = fields.integer("sliding_window_pattern", 4)
    if pattern < 1:
        raise fields.error("sliding_window_pattern", f"is {pattern}, must be at least 1")
    window = fields.integer("sliding_window", 4096)
    layers = read_layers(fields, rope, window=window, pattern=pattern)
    layers = tuple(layer if layer.window else replace(layer, rope=None) for layer in layers)
    return replace(_read(fields, layers), architecture="Cohere2ForCausalLM")


FAMILY: Final = Family("Cohere Command R", ("CohereForCausalLM",), read)
SLIDING: Final = Family("Cohere Command R7B", ("Cohere2ForCausalLM",), read_sliding)
