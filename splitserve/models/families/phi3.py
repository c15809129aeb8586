"""Phi-3, Phi-3.5 and Phi-4-mini: Llama's layers, stored as fused projections, with LongRoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.rope import LongRope

NAMES: Final = replace(
    llama.NAMES,
    qkv=("self_attn.qkv_proj",),
    qkv_order="stacked",
    gate_up=("mlp.gate_up_proj",),
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields = fields.defaulting(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    rope = read_rope(fields, read_head_dim(fields))
    if not isinstance(rope.scaling, LongRope | None):
        raise fields.error("rope_scaling", "is not supported unless it is longrope")
    window = fields.optional_integer("sliding_window")
    base = llama.read(fields, read_layers(fields, rope, window=window))
    return replace(base, architecture="Phi3ForCausalLM", names=NAMES)


FAMILY: Final = Family("Phi-3, Phi-4-mini", ("Phi3ForCausalLM",), read, ships_code=True)
