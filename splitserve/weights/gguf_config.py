"""Reads a model's shape from a GGUF header."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from splitserve.errors import CheckpointError
from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.weights.gguf_file import GgufFile
from splitserve.weights.gguf_names import ROPE_FACTORS
from splitserve.weights.hf_config import read_family_config

_ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """The model's shape. Biases and tied embeddings are told by which tensors there are.

    Raises `CheckpointError` for another family and for what is not implemented.
    """
    fields = Fields(file.path, file.metadata)
    if fields.integer("split.count", 1) > 1:
        raise fields.error("split.count", "is above 1; merge the parts into one file first")
    kind = fields.text("general.architecture")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise fields.error("general.architecture", f"{kind!r} is not supported; supported: {known}")
    try:
        return read_family_config(
            Fields(file.path, _fields(file, fields, kind)), Fields(file.path, {})
        )
    except CheckpointError as exc:
        if exc.message.startswith(str(file.path)):
            raise
        raise CheckpointError(f"{file.path}: {exc.message}") from exc


def _fields(file: GgufFile, fields: Fields, kind: str) -> dict[str, Any]:
    """The header in config.json's terms, for the family's own reader."""
    hidden_size = fields.integer(f"{kind}.embedding_length")
    num_heads = fields.integer(f"{kind}.attention.head_count")
    head_dim = _head_dim(fields, kind, hidden_size, num_heads)
    if fields.integer(f"{kind}.expert_count", 0):
        raise fields.error(f"{kind}.expert_count", "is not 0; mixtures of experts are unsupported")
    if fields.integer(f"{kind}.rope.dimension_count", head_dim) != head_dim:
        raise fields.error(f"{kind}.rope.dimension_count", f"is not the head size {head_dim}")
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer(f"{kind}.feed_forward_length"),
        "num_hidden_layers": fields.integer(f"{kind}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer(f"{kind}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": _vocab_size(file),
        "max_position_embeddings": fields.integer(f"{kind}.context_length"),
        "rms_norm_eps": fields.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number(f"{kind}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, fields, kind, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "bos_token_id": fields.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            token_id
            for key in ("eos_token_id", "eot_token_id", "eom_token_id")
            for token_id in fields.integers(f"tokenizer.ggml.{key}")
        ],
    }


def _head_dim(fields: Fields, kind: str, hidden_size: int, num_heads: int) -> int:
    key, value = f"{kind}.attention.key_length", f"{kind}.attention.value_length"
    if key in fields:
        head_dim = fields.integer(key)
        if fields.integer(value, head_dim) != head_dim:
            raise fields.error(value, "differs from the key's; that is not supported")
        return head_dim
    if num_heads < 1 or hidden_size % num_heads:
        raise fields.error(
            f"{kind}.embedding_length", f"{hidden_size} is not a multiple of {num_heads} heads"
        )
    return hidden_size // num_heads


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    return embedding.shape[0]


def _rope_scaling(
    file: GgufFile, fields: Fields, kind: str, head_dim: int
) -> dict[str, Any] | None:
    scaling = fields.text(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise fields.error(
            f"{kind}.rope.scaling.type", f"{scaling!r} is not supported; supported: none, linear"
        )
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is None:
        if scaling == "none":
            return None
        return {"rope_type": "linear", "factor": fields.number(f"{kind}.rope.scaling.factor")}
    if scaling != "none":
        raise factors.error(f"cannot be combined with {scaling!r} rope scaling")
    if factors.dtype != "F32" or factors.shape != (head_dim // 2,):
        raise factors.error(f"must be F32 of shape ({head_dim // 2},)")
    data = bytearray(factors.size_bytes)
    factors.read_into(memoryview(data))
    return {"rope_type": "factors", "factors": np.frombuffer(data, dtype="<f4").tolist()}
