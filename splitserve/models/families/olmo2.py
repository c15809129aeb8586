"""OLMo 2: Llama's layers normalised at their outputs, and all queries and all keys together."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig, QkNormConfig
from splitserve.models.families import llama
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms

NAMES: Final = replace(
    llama.NAMES,
    norms=BlockNorms(
        attention_output="post_attention_layernorm", mlp_output="post_feedforward_layernorm"
    ),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    base = llama.read(fields.defaulting(rms_norm_eps=1e-5))
    norm = replace(base.norm, fp32_weight=True)
    return replace(
        base,
        architecture="Olmo2ForCausalLM",
        names=NAMES,
        norm=norm,
        attention=replace(base.attention, qk_norm=QkNormConfig(norm, over="all")),
    )


FAMILY: Final = Family("OLMo 2", ("Olmo2ForCausalLM",), read)
