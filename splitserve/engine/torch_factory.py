"""Builds a `TorchEngine` from a checkpoint."""

from __future__ import annotations

import torch
from tqdm import tqdm

from splitserve.engine.attention import Attention, BatchedAttention, RowwiseAttention
from splitserve.engine.factory import EngineConfig, layout_fingerprint, pages_in
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.torch_engine import TorchEngine
from splitserve.errors import ConfigError
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder
from splitserve.models.linear import choose_linear
from splitserve.models.llama import load_llama
from splitserve.weights.checkpoint import Checkpoint, open_checkpoint

_LAYER_GROUPS = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_torch_engine(config: EngineConfig, *, show_progress: bool) -> TorchEngine:
    """See `factory.open_engine`."""
    checkpoint = open_checkpoint(config.model)
    shape = checkpoint.config
    device, dtype = _device(config.device), _dtype(config.dtype)
    model = _load_model(checkpoint, device, dtype, config.deterministic, show_progress)
    spec = _spec(config, shape, checkpoint.identity(), dtype)
    memory = PageMemory(shape, spec.num_pages, spec.block_tokens, dtype, device)
    attention = _attention(memory, device, shape.head_dim, config.deterministic)
    return TorchEngine(spec, model, memory, attention, threads=config.threads)


def _load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool,
    show_progress: bool,
) -> Decoder:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return checkpoint.tensor(name, shape, dtype).to(device)

    shape = checkpoint.config
    make_linear = choose_linear(dtype, device, deterministic=deterministic)
    with tqdm(
        total=shape.num_layers, desc="loading layers", unit="layer", disable=not show_progress
    ) as bar:
        weights = load_llama(shape, read, make_linear, layer_read=bar.update)
    return Decoder(shape, weights)


def _spec(
    config: EngineConfig, shape: ModelConfig, identity: bytes, dtype: torch.dtype
) -> EngineSpec:
    block = config.block_tokens
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    page_bytes = shape.num_layers * block * token_bytes
    geometry = f"{dtype} {block} {page_bytes} {config.deterministic}"
    context = shape.max_context_tokens
    if config.max_context_tokens:
        context = min(context, config.max_context_tokens)
    return EngineSpec(
        fingerprint=layout_fingerprint(identity, geometry),
        vocab_size=shape.vocab_size,
        max_context_tokens=context,
        eos_token_ids=shape.eos_token_ids,
        num_layers=shape.num_layers,
        layer_group=-(-shape.num_layers // _LAYER_GROUPS),
        block_tokens=block,
        block_bytes=page_bytes,
        num_pages=pages_in(config.pool_bytes, page_bytes),
    )


def _attention(
    memory: PageMemory, device: torch.device, head_dim: int, deterministic: bool
) -> Attention:
    if deterministic:
        return RowwiseAttention(memory)
    if device.type != "cuda":
        return BatchedAttention(memory)
    # Only machines with a GPU have triton.
    from splitserve.engine.triton_attention import MAX_HEAD_DIM, TritonAttention

    if head_dim > MAX_HEAD_DIM:
        return BatchedAttention(memory)
    properties = torch.cuda.get_device_properties(device)
    return TritonAttention(memory, properties.multi_processor_count)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a torch device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch sees no GPU here; use --device cpu")
    return device


def _dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
