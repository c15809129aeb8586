"""Qwen3: Qwen2's layers without its biases, queries and keys normalised head by head."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig, QkNormConfig
from splitserve.models.families import llama, qwen2
from splitserve.models.family import Family

NAMES: Final = replace(llama.NAMES, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields = fields.defaulting(head_dim=128)
    base = llama.read(fields, qwen2.read_windows(fields))
    return replace(
        base,
        architecture="Qwen3ForCausalLM",
        names=NAMES,
        attention=replace(base.attention, qk_norm=QkNormConfig(base.norm)),
    )


FAMILY: Final = Family("Qwen3", ("Qwen3ForCausalLM",), read)
