"""Llama and the families that differ from it only in shapes and biases.

What is here is what a checkpoint's names are; the computation is `decoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from splitserve.models.config import ModelConfig
from splitserve.models.decoder import DecoderWeights, LayerWeights

ReadTensor = Callable[[str, tuple[int, ...]], Tensor]
"""`read(name, shape)`: one tensor of the checkpoint in the engine's type and on its device."""


def load_llama(
    config: ModelConfig, read: ReadTensor, layer_read: Callable[[], object]
) -> DecoderWeights:
    """Read all weights; `layer_read` is called after each layer.

    Raises `CheckpointError` naming the first tensor at fault.
    """
    hidden = config.hidden_size
    embedding = read("model.embed_tokens.weight", (config.vocab_size, hidden))
    layers = []
    for index in range(config.num_layers):
        layers.append(_load_layer(config, read, f"model.layers.{index}."))
        layer_read()
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        final_norm=read("model.norm.weight", (hidden,)),
        unembedding=embedding
        if config.tie_word_embeddings
        else read("lm_head.weight", (config.vocab_size, hidden)),
    )


def _load_layer(config: ModelConfig, read: ReadTensor, prefix: str) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim

    def stack(names: tuple[str, ...], heights: tuple[int, ...]) -> Tensor:
        parts = [
            read(f"{prefix}{name}.weight", (height, hidden))
            for name, height in zip(names, heights, strict=True)
        ]
        return torch.cat(parts)

    def biases(names: tuple[str, ...], heights: tuple[int, ...], there: bool) -> Tensor | None:
        if not there:
            return None
        sized = zip(names, heights, strict=True)
        return torch.cat([read(f"{prefix}{name}.bias", (height,)) for name, height in sized])

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (queries, keys, keys)
    gate_up = ("mlp.gate_proj", "mlp.up_proj"), (inner, inner)
    out, down = (("self_attn.o_proj",), (hidden,)), (("mlp.down_proj",), (hidden,))
    return LayerWeights(
        input_norm=read(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=stack(*qkv),
        qkv_bias=biases(*qkv, config.attention_bias),
        attention_out=read(f"{prefix}self_attn.o_proj.weight", (hidden, queries)),
        attention_out_bias=biases(*out, config.attention_output_bias),
        mlp_norm=read(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        gate_up=stack(*gate_up),
        gate_up_bias=biases(*gate_up, config.mlp_bias),
        down=read(f"{prefix}mlp.down_proj.weight", (hidden, inner)),
        down_bias=biases(*down, config.mlp_bias),
    )
