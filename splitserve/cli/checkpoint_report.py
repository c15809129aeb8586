"""What can be said of a checkpoint from its headers, without loading it. Never imports torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from splitserve.chat import ChatTemplate
from splitserve.errors import CheckpointError, ConfigError
from splitserve.models.check import check_weights
from splitserve.models.families import BY_ARCHITECTURE
from splitserve.models.footprint import Workload, footprint, num_parameters
from splitserve.tokenizer import Tokenizer
from splitserve.weights.checkpoint import open_checkpoint
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.safetensors_file import read_safetensors
from splitserve.weights.stored import StoredTensor


@dataclass(frozen=True)
class CheckpointReport:
    """Zeros and empty texts stand for what could not be read. `problem` is one line."""

    path: str
    loads: bool
    problem: str = ""
    family: str = ""
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
    """Of one rank in memory, as are the next four."""
    kv_bytes_per_token: int = 0
    prefill_bytes: int = 0
    decode_bytes: int = 0
    kvstore_bytes: int = 0
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


def inspect(path: Path, workload: Workload) -> CheckpointReport:
    """Checks what loading checks of headers. Raises nothing for a broken checkpoint.

    A context of 0 stands for the model's own.
    """
    try:
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        tensors = _stored_tensors(path)
        context = workload.context or config.max_context_tokens
        need = footprint(checkpoint, replace(workload, context=context))
        check_weights(checkpoint, workload.ranks)
    except (CheckpointError, ConfigError) as error:
        return CheckpointReport(str(path), loads=False, problem=error.message)
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[tensor.dtype] += tensor.size_bytes
    attention = config.attention
    return CheckpointReport(
        path=str(path),
        loads=True,
        family=BY_ARCHITECTURE[config.architecture].name,
        architecture=config.architecture,
        parameters=num_parameters(config),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_context_tokens,
        stored_dtypes=tuple(dtype for dtype, _ in stored.most_common()),
        file_bytes=stored.total(),
        weight_bytes=need.weights,
        kv_bytes_per_token=need.kv_of_token,
        prefill_bytes=need.prefill,
        decode_bytes=need.decode,
        kvstore_bytes=need.kvstore,
        tokenizer=_tokenizer(path),
        chat_template=_chat_template(path),
    )


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
