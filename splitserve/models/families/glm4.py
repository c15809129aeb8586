"""GLM-4: Llama's layers with half of each head turned by neighbours. The later ones (0414) are
normalised on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.names import BlockNorms

NAMES: Final = replace(llama.NAMES, gate_up=("mlp.gate_up_proj",))

SANDWICHED: Final = replace(
    NAMES,
    norms=BlockNorms(
        attention_input="input_layernorm",
        attention_output="post_self_attn_layernorm",
        mlp_input="post_attention_layernorm",
        mlp_output="post_mlp_layernorm",
    ),
)


def read_first(fields: Fields) -> ModelConfig:
    """From the config.json of the first ones, as converted to transformers' own form."""
    fields = fields.defaulting(
        head_dim=128, num_key_value_heads=2, rms_norm_eps=1.5625e-7, attention_bias=True
    )
    rope = read_rope(fields, fields.integer("head_dim"), partial=0.5, interleaved=True)
    base = llama.read(fields, read_layers(fields, rope))
    return replace(
        base,
        architecture="GlmForCausalLM",
        names=NAMES,
        attention=replace(base.attention, out_bias=False),
    )


def read(fields: Fields) -> ModelConfig:
    """From the config.json of the later ones."""
    return replace(read_first(fields), architecture="Glm4ForCausalLM", names=SANDWICHED)


FAMILY: Final = Family("GLM-4 (0414)", ("Glm4ForCausalLM",), read)
FIRST: Final = Family("GLM-4 (9B)", ("GlmForCausalLM",), read_first)
