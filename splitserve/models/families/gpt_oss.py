"""gpt-oss: attention sinks, every second layer sliding, and experts stored as stacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ExpertsConfig, MlpConfig, ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.names import ExpertNames

SWIGLU_ALPHA: Final = 1.702
# Hugging Face's defaults for a config without the key. A window of null is none.
DEFAULT_WINDOW: Final = 128
DEFAULT_ROPE: Final = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

NAMES: Final = replace(
    llama.NAMES,
    gate_up=(),
    down="",
    sinks="self_attn.sinks",
    experts=ExpertNames(
        router="mlp.router",
        gate_up=("mlp.experts.gate_up_proj",),
        down="mlp.experts.down_proj",
        transposed=True,
    ),
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields = fields.defaulting(rms_norm_eps=1e-5, head_dim=64, attention_bias=True)
    fields.expect("swiglu_alpha", SWIGLU_ALPHA)
    if not fields.raw("rope_scaling"):
        fields = fields.defaulting(rope_parameters=DEFAULT_ROPE)
    rope = read_rope(fields, read_head_dim(fields), theta=150000.0)
    given = "sliding_window" in fields.names()
    window = fields.optional_integer("sliding_window") if given else DEFAULT_WINDOW
    layers = read_layers(fields, rope, window=window, pattern=2)
    base = llama.read(fields, layers)
    return replace(
        base,
        architecture="GptOssForCausalLM",
        names=NAMES,
        norm=replace(base.norm, fp32_weight=True),
        attention=replace(base.attention, has_sinks=True),
        mlp=None,
        experts=ExpertsConfig(
            mlp=MlpConfig(
                fields.integer("intermediate_size"),
                "clamped_swiglu",
                limit=fields.number("swiglu_limit", 7.0),
                bias=True,
                down_bias=True,
            ),
            count=fields.integer("num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            softmax="chosen",
            router_bias=True,
        ),
        layers=tuple(replace(layer, has_experts=True) for layer in layers),
    )


FAMILY: Final = Family("gpt-oss", ("GptOssForCausalLM",), read)
