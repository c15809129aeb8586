"""Gemma 1: Llama's layers with norms stored less one and embeddings scaled by the hidden size."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import LayerConfig, MlpConfig, ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_activation
from splitserve.models.family import Family


def read_gemma(fields: Fields, layers: tuple[LayerConfig, ...] = ()) -> ModelConfig:
    """What all Gemmas have in common."""
    if fields.boolean("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is not supported")
    base = llama.read(fields.defaulting(head_dim=256, tie_word_embeddings=True), layers)
    return replace(
        base,
        norm=replace(base.norm, weight_offset=1.0),
        mlp=MlpConfig(fields.integer("intermediate_size"), "gelu_tanh"),
        embedding_scale=base.hidden_size**0.5,
    )


def read(fields: Fields) -> ModelConfig:
    """From config.json. The first files said "gelu" and meant its approximation."""
    base = read_gemma(fields)
    activation = read_activation(fields, "hidden_act", "gelu")
    return replace(
        base,
        architecture="GemmaForCausalLM",
        mlp=MlpConfig(
            fields.integer("intermediate_size"),
            "gelu_tanh" if activation == "gelu" else activation,
        ),
    )


FAMILY: Final = Family("Gemma 1", ("GemmaForCausalLM",), read)
