"""Qwen3-MoE: queries and keys normalised head by head, mixtures of MLPs in all or some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import (
    ExpertsConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    QkNormConfig,
)
from splitserve.models.families import llama, qwen3
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family
from splitserve.models.names import ExpertNames

NAMES: Final = replace(
    qwen3.NAMES,
    experts=ExpertNames(
        router="mlp.gate",
        gate_up=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        down="mlp.experts.{}.down_proj",
    ),
)


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    layers = _layers(fields)
    base = llama.read(fields, layers)
    assert base.mlp is not None
    count = "num_experts" if "num_experts" in fields else "num_local_experts"
    return replace(
        base,
        architecture="Qwen3MoeForCausalLM",
        names=NAMES,
        attention=replace(base.attention, qk_norm=QkNormConfig(base.norm)),
        mlp=replace(base.mlp, bias=False, down_bias=False),
        experts=ExpertsConfig(
            mlp=MlpConfig(fields.integer("moe_intermediate_size"), base.mlp.activation),
            count=fields.integer(count),
            top_k=fields.integer("num_experts_per_tok"),
            renormalized=fields.boolean("norm_topk_prob", False),
        ),
        layers=tuple(
            replace(layer, has_experts=sparse)
            for layer, sparse in zip(layers, _sparse(fields, len(layers)), strict=True)
        ),
    )


def _layers(fields: Fields) -> tuple[LayerConfig, ...]:
    """All of them slide or none."""
    window = None
    if fields.boolean("use_sliding_window", False):
        window = fields.optional_integer("sliding_window")
    return read_layers(fields, read_rope(fields, read_head_dim(fields)), window=window)


def _sparse(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers are mixtures: every `decoder_sparse_step`-th but those of `mlp_only_layers`."""
    step, dense = fields.integer("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
    if step < 1:
        raise fields.error("decoder_sparse_step", f"is {step}, must be at least 1")
    return [(i + 1) % step == 0 and i not in dense for i in range(num_layers)]


FAMILY: Final = Family("Qwen3-MoE", ("Qwen3MoeForCausalLM",), read)
