"""Tiny checkpoints in both formats, with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (32, 16),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (16,),
            prefix + "self_attn.q_proj.weight": (16, 16),
            prefix + "self_attn.k_proj.weight": (8, 16),
            prefix + "self_attn.v_proj.weight": (8, 16),
            prefix + "self_attn.o_proj.weight": (16, 16),
            prefix + "post_attention_layernorm.weight": (16,),
            prefix + "mlp.gate_proj.weight": (24, 16),
            prefix + "mlp.up_proj.weight": (24, 16),
            prefix + "mlp.down_proj.weight": (16, 24),
        }
    return shapes


class Tiny:
    """A tiny model's weights and ways to write them."""

    def __init__(self, directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.directory = directory
        self.tensors = tensors

    def write_config(self, **changes: Any) -> None:
        config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
        (self.directory / "config.json").write_text(json.dumps(config))

    def write_single(self) -> Path:
        path = self.directory / "model.safetensors"
        save_file(self.tensors, path)
        return path

    def write_sharded(self) -> dict[str, str]:
        names = sorted(self.tensors)
        weight_map = {}
        for part in range(2):
            file = f"model-{part + 1:05}-of-00002.safetensors"
            save_file({name: self.tensors[name] for name in names[part::2]}, self.directory / file)
            weight_map |= dict.fromkeys(names[part::2], file)
        self.write_index(weight_map)
        return weight_map

    def write_index(self, weight_map: dict[str, str]) -> None:
        (self.directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )

    def write_gguf(self, edit: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
        path = self.directory / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(2)
        writer.add_context_length(64)
        writer.add_embedding_length(16)
        writer.add_feed_forward_length(24)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for name, tensor in self.tensors.items():
            writer.add_tensor(gguf_name(name), permute(name, tensor.numpy()))
        if edit is not None:
            edit(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def gguf_name(name: str) -> str:
    table = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers.": "blk.",
    }
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def permute(name: str, weights: np.ndarray, heads: int | None = None) -> np.ndarray:
    """What llama.cpp's converter does to Llama's query and key projections."""
    if heads is None:
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    if not heads:
        return weights
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes().items()
    }
    made = Tiny(tmp_path, tensors)
    made.write_config()
    return made
