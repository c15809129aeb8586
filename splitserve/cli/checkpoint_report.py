"""What can be said of a checkpoint from its headers, without loading it. Never imports torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from splitserve.chat import ChatTemplate
from splitserve.errors import CheckpointError
from splitserve.models.config import ModelConfig
from splitserve.tokenizer import Tokenizer
from splitserve.weights.checkpoint import open_checkpoint
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.safetensors_file import read_safetensors
from splitserve.weights.stored import StoredTensor

BYTES_OF_16_BITS = 2
TOKENS = 1024


@dataclass(frozen=True)
class CheckpointReport:
    """Zeros and empty texts stand for what could not be read. `problem` is one line."""

    path: str
    loads: bool
    problem: str = ""
    architecture: str = ""
    parameters: int = 0
    num_layers: int = 0
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    max_context_tokens: int = 0
    stored_dtypes: tuple[str, ...] = ()
    """Those of most bytes first."""
    file_bytes: int = 0
    weight_bytes: int = 0
    kv_bytes_per_1k_tokens: int = 0
    tokenizer: str = ""
    chat_template: str = ""


def find_checkpoints(path: Path) -> list[Path]:
    """`path` itself if it is a checkpoint or a file, else those directly inside it, sorted."""
    if not path.is_dir() or (path / "config.json").exists():
        return [path]
    return sorted(
        each
        for each in path.iterdir()
        if (each.is_dir() and (each / "config.json").exists()) or each.suffix == ".gguf"
    )


def inspect(path: Path) -> CheckpointReport:
    """Checks what loading checks of headers. Raises nothing for a broken checkpoint."""
    try:
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        tensors = _stored_tensors(path)
        for name, shape in expected_tensors(config).items():
            checkpoint.check_tensor(name, shape)
    except CheckpointError as error:
        return CheckpointReport(str(path), loads=False, problem=error.message)
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[tensor.dtype] += tensor.size_bytes
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    kv_values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return CheckpointReport(
        path=str(path),
        loads=True,
        architecture=config.architecture,
        parameters=parameters,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_context_tokens,
        stored_dtypes=tuple(dtype for dtype, _ in stored.most_common()),
        file_bytes=stored.total(),
        weight_bytes=parameters * BYTES_OF_16_BITS,
        kv_bytes_per_1k_tokens=kv_values * TOKENS * BYTES_OF_16_BITS,
        tokenizer=_tokenizer(path),
        chat_template=_chat_template(path),
    )


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of this config has, in the order of loading."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        for name, shape in _layer_tensors(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    # Name, rows, columns, and whether there is a bias.
    projections = (
        ("self_attn.q_proj", queries, hidden, config.attention_bias),
        ("self_attn.k_proj", keys, hidden, config.attention_bias),
        ("self_attn.v_proj", keys, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, queries, config.attention_output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows, columns, biased in projections:
        shapes[f"{name}.weight"] = (rows, columns)
        if biased:
            shapes[f"{name}.bias"] = (rows,)
    return shapes | {"post_attention_layernorm.weight": (hidden,)}


def _stored_tensors(path: Path) -> list[StoredTensor]:
    if not path.is_dir():
        return list(read_gguf(path).tensors.values())
    shards = [read_safetensors(shard) for shard in sorted(path.glob("*.safetensors"))]
    return [tensor for shard in shards for tensor in shard.values()]


def _tokenizer(path: Path) -> str:
    try:
        return f"yes, {Tokenizer.from_checkpoint(path).vocab_size} tokens"
    except CheckpointError as error:
        return f"no: {error.message}"


def _chat_template(path: Path) -> str:
    try:
        return "yes" if ChatTemplate.from_checkpoint(path) else "no"
    except CheckpointError as error:
        return f"no: {error.message}"
