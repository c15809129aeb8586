"""A torch engine on a tiny random model."""

from collections.abc import Callable

import torch

from splitserve.engine.attention import Attention, BatchedAttention, RowwiseAttention
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.torch_engine import TorchEngine
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder, DecoderWeights, LayerWeights
from splitserve.models.linear import choose_linear

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=120,
    max_context_tokens=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
CPU = torch.device("cpu")

MakeAttention = Callable[[PageMemory], Attention]


def random_weights(dtype: torch.dtype, deterministic: bool, device: torch.device) -> DecoderWeights:
    generator = torch.Generator().manual_seed(5)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)

    linear = choose_linear(dtype, device, deterministic=deterministic)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=1 + make(48),
            qkv=linear(make(80, 48), make(80)),
            attention_out=linear(make(48, 48), None),
            mlp_norm=1 + make(48),
            gate_up=linear(make(160, 48), None),
            down=linear(make(48, 80), None),
        )

    layers = [layer() for _ in range(3)]
    return DecoderWeights(make(120, 48) * 7, layers, 1 + make(48), linear(make(120, 48) * 3, None))


def make_engine(
    *,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    num_pages: int = 64,
    device: torch.device = CPU,
    make_attention: MakeAttention | None = None,
) -> TorchEngine:
    """`make_attention` takes the place of the mode's own attention."""
    memory = PageMemory(CONFIG, num_pages, 4, dtype, device)
    spec = EngineSpec(
        fingerprint=b"tiny",
        vocab_size=120,
        max_context_tokens=512,
        eos_token_ids=frozenset(),
        num_layers=3,
        layer_group=2,
        block_tokens=4,
        block_bytes=3 * 2 * 4 * 2 * 8 * dtype.itemsize,
        num_pages=num_pages,
    )
    model = Decoder(CONFIG, random_weights(dtype, deterministic, device))
    make = make_attention or (RowwiseAttention if deterministic else BatchedAttention)
    return TorchEngine(spec, model, memory, make(memory))
