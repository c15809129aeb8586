"""Builds a `TorchEngine` from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from tqdm import tqdm

from splitserve.engine.attention import Attention, BatchedAttention, RowwiseAttention
from splitserve.engine.factory import EngineConfig, layout_fingerprint, pages_in
from splitserve.engine.page_memory import PageMemory, PlainPageMemory, open_page_memory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.quantization import quantizing, recipe
from splitserve.engine.torch_engine import TorchEngine
from splitserve.errors import ConfigError
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Block
from splitserve.models.layers.embedding import Embedding
from splitserve.models.layers.self_attention import AttentionRules
from splitserve.models.linear import choose_products
from splitserve.models.load import Loader
from splitserve.parallel.group import Group, SingleGroup
from splitserve.weights.checkpoint import open_checkpoint

_LAYER_GROUPS = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES: Mapping[torch.dtype, KvDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def open_torch_engine(
    config: EngineConfig, group: Group | None = None, *, show_progress: bool
) -> TorchEngine:
    """See `factory.open_engine`. `group` has the ranks that share the model."""
    checkpoint = open_checkpoint(config.model)
    shape = checkpoint.config
    device, dtype = parse_device(config.device), parse_dtype(config.dtype)
    group = group or SingleGroup()
    products = choose_products(dtype, device, deterministic=config.deterministic)
    products, observers = quantizing(products, config.quantization, config.model)
    loader = Loader(shape, checkpoint, products, group, dtype, device)
    page = replace(page_shape(config, shape), num_kv_heads=loader.num_kv_heads)
    num_pages = pages_in(config.pool_bytes, page.page_bytes)
    spec = _spec(config, shape, checkpoint.identity(), group.size, num_pages)
    with tqdm(
        total=shape.num_layers, desc="loading layers", unit="layer", disable=not show_progress
    ) as bar:
        model = loader.load(spec.max_context_tokens, [*observers, _Progress(bar)])
    memory = open_page_memory(page, num_pages, dtype, device)
    attention = _attention(memory, model.rules, device, shape, config.deterministic)
    return TorchEngine(spec, model, memory, attention, group, threads=config.threads)


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
    context = shape.max_context_tokens
    if config.max_context_tokens:
        context = min(context, config.max_context_tokens)
    ropes = sorted(repr(rope) for rope in _frequencies(shape, context))
    weights = recipe(config.quantization, config.model, ranks)
    geometry = f"{parse_dtype(config.dtype)} {page} {weights} {deterministic} {ropes}"
    return EngineSpec(
        fingerprint=layout_fingerprint(identity, geometry),
        vocab_size=shape.vocab_size,
        max_context_tokens=context,
        eos_token_ids=shape.eos_token_ids,
        num_layers=shape.num_layers,
        layer_group=-(-shape.num_layers // _LAYER_GROUPS),
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


def _attention(
    memory: PageMemory,
    rules: list[AttentionRules],
    device: torch.device,
    shape: ModelConfig,
    deterministic: bool,
) -> Attention:
    if deterministic:
        return RowwiseAttention(memory, rules)
    if device.type != "cuda":
        return BatchedAttention(memory, rules)
    # Only machines with a GPU have triton.
    from splitserve.engine.triton_attention import MAX_HEAD_DIM, TritonAttention

    if not isinstance(memory, PlainPageMemory):
        return BatchedAttention(memory, rules)
    head_dim = shape.attention.head_dim
    usual_scale = all(each.scale == head_dim**-0.5 for each in rules)
    if head_dim > MAX_HEAD_DIM or not usual_scale or not all(each.plain for each in rules):
        return BatchedAttention(memory, rules)
    properties = torch.cuda.get_device_properties(device)
    return TritonAttention(memory, properties.multi_processor_count)


def parse_device(name: str) -> torch.device:
    """A device that is there. Raises `ConfigError`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a torch device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch sees no GPU here; use --device cpu")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """A model's type, `auto` for bf16. Raises `ConfigError`."""
    if name == "auto":
        return torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
