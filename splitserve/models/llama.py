"""Llama and the families that differ from it only in shapes and biases.

What is here is what a checkpoint's names are; the computation is `decoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from splitserve.models.config import ModelConfig
from splitserve.models.decoder import DecoderWeights, LayerWeights
from splitserve.models.linear import Linear, MakeLinear

ReadTensor = Callable[[str, tuple[int, ...]], Tensor]
"""`read(name, shape)`: one tensor of the checkpoint in the engine's type and on its device."""


def load_llama(
    config: ModelConfig,
    read: ReadTensor,
    make_linear: MakeLinear,
    layer_read: Callable[[], object],
) -> DecoderWeights:
    """Read all weights; `layer_read` is called after each layer.

    Raises `CheckpointError` naming the first tensor at fault.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = read("model.embed_tokens.weight", (vocab, hidden))
    layers = []
    for index in range(config.num_layers):
        layers.append(_load_layer(config, read, make_linear, f"model.layers.{index}."))
        layer_read()
    tied = config.tie_word_embeddings
    unembedding = embedding if tied else read("lm_head.weight", (vocab, hidden))
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        final_norm=read("model.norm.weight", (hidden,)),
        unembedding=make_linear(unembedding, None),
    )


def _load_layer(
    config: ModelConfig, read: ReadTensor, make_linear: MakeLinear, prefix: str
) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim

    def linear(heights: dict[str, int], width: int, *, has_bias: bool) -> Linear:
        """Projections of one input as one product, in the order given."""
        weight = [read(f"{prefix}{name}.weight", (out, width)) for name, out in heights.items()]
        bias = [read(f"{prefix}{name}.bias", (out,)) for name, out in heights.items() if has_bias]
        return make_linear(torch.cat(weight), torch.cat(bias) if bias else None)

    return LayerWeights(
        input_norm=read(f"{prefix}input_layernorm.weight", (hidden,)),
        qkv=linear(
            {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
            hidden,
            has_bias=config.attention_bias,
        ),
        attention_out=linear(
            {"self_attn.o_proj": hidden}, queries, has_bias=config.attention_output_bias
        ),
        mlp_norm=read(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        gate_up=linear(
            {"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, has_bias=config.mlp_bias
        ),
        down=linear({"mlp.down_proj": hidden}, inner, has_bias=config.mlp_bias),
    )
