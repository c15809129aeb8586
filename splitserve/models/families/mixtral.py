"""Mixtral: Mistral's layers with a mixture of MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ExpertsConfig, ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.names import ExpertNames

NAMES: Final = replace(
    llama.NAMES,
    gate_up=(),
    down="",
    experts=ExpertNames(
        router="block_sparse_moe.gate",
        gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        down="block_sparse_moe.experts.{}.w2",
    ),
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    fields = fields.defaulting(rms_norm_eps=1e-5)
    rope = read_rope(fields, read_head_dim(fields), theta=1e6)
    layers = read_layers(fields, rope, window=fields.optional_integer("sliding_window"))
    base = llama.read(fields, layers)
    assert base.mlp is not None
    return replace(
        base,
        architecture="MixtralForCausalLM",
        names=NAMES,
        attention=replace(base.attention, qkv_bias=False, out_bias=False),
        mlp=None,
        experts=ExpertsConfig(
            mlp=replace(base.mlp, bias=False, down_bias=False),
            count=fields.integer("num_local_experts"),
            top_k=fields.integer("num_experts_per_tok"),
        ),
        layers=tuple(replace(layer, has_experts=True) for layer in layers),
    )


FAMILY: Final = Family("Mixtral", ("MixtralForCausalLM",), read)
