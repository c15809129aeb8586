"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import LayerConfig, ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family


def read_windows(fields: Fields) -> tuple[LayerConfig, ...]:
    """Layers of which those from `max_window_layers` on slide, if any do."""
    rope = read_rope(fields, read_head_dim(fields))
    window = None
    if fields.boolean("use_sliding_window", False):
        window = fields.optional_integer("sliding_window")
    layers = read_layers(fields, rope, window=window)
    if window is None or "layer_types" in fields:
        return layers
    first = fields.integer("max_window_layers", 28)
    return tuple(replace(layer, window=None) for layer in layers[:first]) + layers[first:]


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    config = llama.read(fields)
    return replace(
        config,
        architecture="Qwen2ForCausalLM",
        attention=replace(config.attention, qkv_bias=True, out_bias=False),
        layers=read_windows(fields),
    )


FAMILY: Final = Family("Qwen2", ("Qwen2ForCausalLM",), read)
