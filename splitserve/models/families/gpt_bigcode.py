"""GPT-BigCode: StarCoder and SantaCoder. GPT-2's layers, mostly with one KV head."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.models.families import gpt2
from splitserve.models.family import Family

# Not GPT-2's Conv1D, and each KV head's queries, key and value together.
NAMES: Final = replace(gpt2.NAMES, qkv_order="grouped", transposed=False)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    config = gpt2.read(fields)
    attention = config.attention
    if fields.boolean("multi_query", True):
        attention = replace(attention, num_kv_heads=1)
    return replace(config, architecture="GPTBigCodeForCausalLM", names=NAMES, attention=attention)


FAMILY: Final = Family("GPT-BigCode, StarCoder", ("GPTBigCodeForCausalLM",), read)
