"""Builds an engine that computes a model from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import torch
from tqdm import tqdm

from splitserve.engine.attention import BatchedAttention, RowwiseAttention
from splitserve.engine.factory import EngineConfig, layout_fingerprint, pages_in
from splitserve.engine.page_memory import open_page_memory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.quantization import quantizing, recipe
from splitserve.engine.torch_engine import TorchEngine
from splitserve.errors import ConfigError
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.backend import Backend, TorchBackend
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Block, Decoder
from splitserve.models.layers.embedding import Embedding
from splitserve.models.linear import choose_products
from splitserve.models.load import Loader
from splitserve.parallel.group import Group, SingleGroup
from splitserve.weights.checkpoint import Checkpoint, open_checkpoint
from splitserve.weights.dummy_checkpoint import DummyCheckpoint

if TYPE_CHECKING:
    from splitserve.engine.cuda.engine import CudaEngine

ModelEngine: TypeAlias = "TorchEngine | CudaEngine"

_LAYER_GROUPS: Final = {"cpu": 2, "cuda": 8}
"""How many groups of layers a prompt is handed over in: a GPU has copied the last of many sooner,
and on a CPU each costs the compute its turn.
"""
_MOST_HEAD_DIM = 256
_PLAIN_STEP_BYTES: Final = 2 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES: Mapping[torch.dtype, KvDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def open_torch_engine(
    config: EngineConfig, group: Group | None = None, *, show_progress: bool
) -> ModelEngine:
    """See `factory.open_engine`. `group` has the ranks that share the model."""
    device, dtype = parse_device(config.device), parse_dtype(config.dtype)
    if device.index is not None:
        torch.cuda.set_device(device)  # where this thread's kernels go
    checkpoint = _open_weights(config, device)
    shape = checkpoint.config
    group = group or SingleGroup()
    on_kernels = device.type == "cuda" and not config.deterministic and _have_kernels(shape)
    products = choose_products(dtype, device, deterministic=config.deterministic)
    products, observers = quantizing(products, config.quantization, config.model)
    backend = _triton_backend() if on_kernels else TorchBackend()
    loader = Loader(shape, checkpoint, products, group, dtype, device, backend)
    with tqdm(
        total=shape.num_layers, desc="loading layers", unit="layer", disable=not show_progress
    ) as bar:
        model = loader.load(served_context(config, shape), [*observers, _Progress(bar)])
    page = replace(page_shape(config, shape), num_kv_heads=loader.num_kv_heads)
    num_pages = _num_pages(config, model, page, group, device)
    spec = _spec(config, shape, checkpoint.identity(), group.size, num_pages)
    memory = open_page_memory(page, num_pages, dtype, device)
    if on_kernels:
        # Only machines with a GPU need triton.
        from splitserve.engine.cuda.opening import open_cuda_engine

        return open_cuda_engine(
            spec,
            model,
            memory,
            group,
            max_batch=config.max_batch,
            max_step_tokens=config.max_step_tokens,
            show_progress=show_progress,
        )
    attend = RowwiseAttention if config.deterministic else BatchedAttention
    attention = attend(memory, model.rules)
    return TorchEngine(spec, model, memory, attention, group, threads=config.threads)


def _open_weights(config: EngineConfig, device: torch.device) -> Checkpoint:
    if config.load_format == "dummy":
        return DummyCheckpoint(Path(config.model), device)
    return open_checkpoint(config.model)


def served_context(config: EngineConfig, shape: ModelConfig) -> int:
    """The longest context, in tokens."""
    context = shape.max_context_tokens
    return min(context, config.max_context_tokens) if config.max_context_tokens else context


def _have_kernels(shape: ModelConfig) -> bool:
    return shape.attention.head_dim <= _MOST_HEAD_DIM


def _triton_backend() -> Backend:
    from splitserve.models.triton_backend import TritonBackend

    return TritonBackend()


def _num_pages(
    config: EngineConfig, model: Decoder, page: PageShape, group: Group, device: torch.device
) -> int:
    """Pages of the pool: as many on all ranks. Raises `ConfigError` if not one fits."""
    if config.pool_bytes:
        return pages_in(config.pool_bytes, page.page_bytes)
    beside = _bytes_beside(config, model, page)
    # What loading has left behind in the allocator is free.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    mine = int(config.gpu_memory_utilization * total)
    weights = torch.cuda.memory_reserved(device)
    room = min(mine - weights - beside, free - beside)
    pages = torch.tensor([[float(max(0, room // page.page_bytes))]], device=device)
    if group.size > 1:
        pages = group.all_gather_columns(pages).min()
    if pages < 1:
        raise ConfigError(
            f"no room for the KV pool: the GPU has {total >> 20} MiB, {free >> 20} of them free; "
            f"of gpu_memory_utilization {config.gpu_memory_utilization}, weights take "
            f"{weights >> 20} and a step of {config.max_step_tokens} tokens {beside >> 20} MiB"
        )
    return int(pages)


def _bytes_beside(config: EngineConfig, model: Decoder, page: PageShape) -> int:
    """What steps take of a GPU beside weights and pool."""
    if config.deterministic or not _have_kernels(model.config):
        return _PLAIN_STEP_BYTES
    from splitserve.engine.cuda.opening import step_bytes

    return step_bytes(
        model, page, max_batch=config.max_batch, max_step_tokens=config.max_step_tokens
    )


class _Progress:
    """Shows how many layers have been loaded."""

    def __init__(self, bar: tqdm[NoReturn]) -> None:
        self._bar = bar

    def embedded(self, embedding: Embedding) -> None:
        """See `LoadObserver`."""

    def loaded(self, block: Block) -> None:
        """See `LoadObserver`."""
        self._bar.update()


def _spec(
    config: EngineConfig, shape: ModelConfig, identity: bytes, ranks: int, num_pages: int
) -> EngineSpec:
    """The worker's: its pages have all KV heads. Groups of any size understand each other's KV,
    but in deterministic mode, where sums over another number of ranks have other bits, and where
    weights were quantised by what a rank has of them.
    """
    page = page_shape(config, shape)
    deterministic = f"over {ranks}" if config.deterministic else "no"
    context = served_context(config, shape)
    ropes = sorted(repr(rope) for rope in _frequencies(shape, context))
    weights = recipe(config.quantization, config.model, ranks)
    geometry = f"{parse_dtype(config.dtype)} {page} {weights} {deterministic} {ropes}"
    return EngineSpec(
        fingerprint=layout_fingerprint(identity, geometry),
        vocab_size=shape.vocab_size,
        max_context_tokens=context,
        eos_token_ids=shape.eos_token_ids,
        num_layers=shape.num_layers,
        layer_group=-(-shape.num_layers // _LAYER_GROUPS.get(parse_device(config.device).type, 2)),
        block_tokens=config.block_tokens,
        block_bytes=page.page_bytes,
        num_pages=num_pages,
    )


def page_shape(config: EngineConfig, shape: ModelConfig) -> PageShape:
    """A page with all KV heads."""
    dtype = config.kv_dtype if config.kv_dtype != "auto" else _KV_DTYPES[parse_dtype(config.dtype)]
    attention = shape.attention
    return PageShape(
        shape.num_layers, config.block_tokens, attention.num_kv_heads, attention.head_dim, dtype
    )


def _frequencies(shape: ModelConfig, context: int) -> set[tuple[float, ...]]:
    """Keys are turned by these: engines of different ones must not share KV."""
    ropes = {layer.rope for layer in shape.layers if layer.rope}
    return {tuple(rope.inverse_frequencies(context).tolist()) for rope in ropes}


def parse_device(name: str) -> torch.device:
    """A device that is there. Raises `ConfigError`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a torch device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch sees no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs here")
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError(f"device {name!r} needs triton: pip install 'splitserve[engine,gpu]'")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """A model's type, `auto` for bf16. Raises `ConfigError`."""
    if name == "auto":
        return torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
