"""A torch engine on a tiny random model."""

from collections.abc import Callable, Sequence

import torch

from splitserve.engine.attention import Attention, BatchedAttention, RowwiseAttention
from splitserve.engine.page_memory import PageMemory, open_page_memory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.torch_engine import TorchEngine
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    like_layers,
)
from splitserve.models.families import llama
from splitserve.models.layers.self_attention import AttentionRules
from splitserve.models.linear import choose_products
from splitserve.models.load import Loader
from splitserve.models.rope import RopeConfig
from splitserve.parallel.group import SingleGroup
from splitserve.weights.source import MatrixSource, TensorSource

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    names=llama.NAMES,
    hidden_size=48,
    vocab_size=120,
    max_context_tokens=512,
    norm=NormConfig("rms", 1e-5),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8, qkv_bias=True),
    mlp=MlpConfig(80),
    layers=like_layers(3, LayerConfig(rope=RopeConfig(10000.0, 8))),
)
CPU = torch.device("cpu")
KV_DTYPES: dict[torch.dtype, KvDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

MakeAttention = Callable[[PageMemory, Sequence[AttentionRules]], Attention]


class RandomWeights:
    """Weights that are drawn in the order they are asked for."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(source.read_shape, generator=self._generator)
        if "norm" in source.name:
            return (1 + values * source.read_shape[-1] ** -0.5).to(dtype)
        return (values * (7 if "embed" in source.name else 1) * 0.1).to(dtype)

    def matrix(self, source: MatrixSource, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(source.read_shape, generator=self._generator)
        return (values * source.read_shape[-1] ** -0.5).to(dtype)


def make_engine(
    *,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    num_pages: int = 64,
    device: torch.device = CPU,
    make_attention: MakeAttention | None = None,
    kv_dtype: KvDtype | None = None,
) -> TorchEngine:
    """`make_attention` takes the place of the mode's own attention."""
    shape = PageShape(3, 4, 2, 8, kv_dtype or KV_DTYPES[dtype])
    memory = open_page_memory(shape, num_pages, dtype, device)
    spec = EngineSpec(
        fingerprint=b"tiny",
        vocab_size=120,
        max_context_tokens=512,
        eos_token_ids=frozenset(),
        num_layers=3,
        layer_group=2,
        block_tokens=4,
        block_bytes=shape.page_bytes,
        num_pages=num_pages,
    )
    products = choose_products(dtype, device, deterministic=deterministic)
    group = SingleGroup()
    loader = Loader(CONFIG, RandomWeights(), products, group, dtype, device)
    model = loader.load(512)
    make = make_attention or (RowwiseAttention if deterministic else BatchedAttention)
    return TorchEngine(spec, model, memory, make(memory, model.rules), group)
