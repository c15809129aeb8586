"""Writes the small real model in bf16 with its channels shuffled.

The only real model that a package index has was stored in 4 bits by groups of 32 channels: a
quantiser with the same groups would find the same grid again and seem to lose nothing. Shuffling
channels changes nothing in full precision (every row that wrote a channel and every column that
read it move together) and puts weights of other groups side by side.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.weights.checkpoint import Checkpoint, open_checkpoint
from splitserve.weights.gguf_tokenizer import build_gguf_tokenizer
from splitserve.weights.source import MatrixSource, TensorSource


def write_shuffled(model: Path, directory: Path, *, shuffled: bool = True) -> Path:
    """A Hugging Face directory from a GGUF file of a Llama with a tied embedding.

    Not `shuffled`, channels stay where they are: only to show what that hides.
    """
    checkpoint = open_checkpoint(model)
    shuffle = _Shuffle(checkpoint, shuffled)
    tensors = {name: shuffle.tensor(name) for name in checkpoint.tensor_names()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(_config(checkpoint.config)))
    header = Fields(model, dict(checkpoint.metadata))
    build_gguf_tokenizer(header).save(str(directory / "tokenizer.json"))
    return directory


class _Shuffle:
    """Moves hidden channels everywhere alike, an MLP's channels within a layer, and a head's
    value channels within the head.
    """

    def __init__(self, checkpoint: Checkpoint, shuffled: bool) -> None:
        config = checkpoint.config
        assert config.mlp is not None
        generator = torch.Generator().manual_seed(0)

        def order(size: int) -> Tensor:
            return torch.randperm(size, generator=generator) if shuffled else torch.arange(size)

        self._checkpoint = checkpoint
        self._hidden = order(config.hidden_size)
        self._inner = order(config.mlp.size)
        self._head = order(config.attention.head_dim)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in bf16."""
        config = self._checkpoint.config
        assert config.mlp is not None
        attention, hidden, inner = config.attention, config.hidden_size, config.mlp.size
        if name.endswith("norm.weight"):
            return self._vector(name, hidden)[self._hidden].contiguous()
        queries, keys = self._heads(attention.num_heads), self._heads(attention.num_kv_heads)
        everything = torch.arange(max(config.vocab_size, attention.query_size))
        sides = {
            "embed_tokens": (everything[: config.vocab_size], self._hidden),
            "q_proj": (everything[: attention.query_size], self._hidden),
            "k_proj": (everything[: attention.kv_size], self._hidden),
            "v_proj": (keys, self._hidden),
            "o_proj": (self._hidden, queries),
            "gate_proj": (self._inner, self._hidden),
            "up_proj": (self._inner, self._hidden),
            "down_proj": (self._hidden, self._inner),
        }
        rows, columns = sides[name.split(".")[-2]]
        weight = self._matrix(name, (len(rows), len(columns)))
        assert inner == len(self._inner)
        return weight[rows][:, columns].contiguous()

    def _heads(self, count: int) -> Tensor:
        size = len(self._head)
        return torch.cat([self._head + head * size for head in range(count)])

    def _vector(self, name: str, size: int) -> Tensor:
        return self._checkpoint.tensor(TensorSource(name, (size,)), torch.bfloat16)

    def _matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight = self._checkpoint.matrix(MatrixSource(name, shape), torch.bfloat16)
        return weight if isinstance(weight, Tensor) else weight.dequantize(torch.bfloat16)


def _config(config: ModelConfig) -> dict[str, object]:
    attention, mlp, rope = config.attention, config.mlp, config.layers[0].rope
    assert mlp is not None
    assert rope is not None
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.norm.eps,
        "rope_theta": rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": sorted(config.eos_token_ids),
    }
