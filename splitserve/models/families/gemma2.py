"""Gemma 2: Gemma's layers with norms on both sides, soft caps, and every second layer sliding."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import LayerConfig, MlpConfig, ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.gemma import read_gemma
from splitserve.models.families.reading import read_activation, read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.limits import check_positive
from splitserve.models.names import BlockNorms

NAMES: Final = replace(
    llama.NAMES,
    norms=BlockNorms(
        attention_input="input_layernorm",
        attention_output="post_attention_layernorm",
        mlp_input="pre_feedforward_layernorm",
        mlp_output="post_feedforward_layernorm",
    ),
)


def read_capped(fields: Fields, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    """What Gemma 2 and 3 have in common."""
    base = read_gemma(fields, layers)
    query_scalar = fields.number("query_pre_attn_scalar", 256.0)
    check_positive("query_pre_attn_scalar", query_scalar)
    activation = read_activation(fields, "hidden_activation", "gelu_pytorch_tanh")
    return replace(
        base,
        names=NAMES,
        attention=replace(base.attention, scale=query_scalar**-0.5),
        mlp=MlpConfig(fields.integer("intermediate_size"), activation),
        logit_soft_cap=read_soft_cap(fields, "final_logit_softcapping"),
    )


def read_soft_cap(fields: Fields, key: str) -> float | None:
    """A bound of scores, None for none."""
    return fields.number(key) if key in fields else None


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields = fields.defaulting(head_dim=256)
    # A null cap is none, a missing one is the default.
    caps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    fields = fields.defaulting(**{k: v for k, v in caps.items() if k not in fields.names()})
    window = fields.integer("sliding_window", 4096)
    rope = read_rope(fields, fields.integer("head_dim"))
    base = read_capped(fields, read_layers(fields, rope, window=window, pattern=2))
    soft_cap = read_soft_cap(fields, "attn_logit_softcapping")
    return replace(
        base,
        architecture="Gemma2ForCausalLM",
        attention=replace(base.attention, soft_cap=soft_cap),
    )


FAMILY: Final = Family("Gemma 2", ("Gemma2ForCausalLM",), read)
