"""Tiny random checkpoints that every kind of quantisation takes, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
)

from splitserve.engine.factory import EngineConfig, Quantization
from splitserve.engine.protocol import Slice
from splitserve.engine.torch_engine import TorchEngine
from splitserve.engine.torch_factory import open_torch_engine

from ...families import parity

VOCABULARY = 256
TOKENS = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_OLD = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED),
    "llama-tied": LlamaConfig(
        **_SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "neox": GPTNeoXConfig(**_SMALL),
    "phi3": Phi3Config(**_SMALL),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4),
    "bloom": BloomConfig(**_OLD),
    "gemma": GemmaConfig(**_GROUPED, head_dim=16),
    "mixtral": MixtralConfig(**_GROUPED, num_local_experts=4),
}


def save(name: str, directory: Path) -> Path:
    """One of `CONFIGS` as transformers saves it, with a token for each byte."""
    parity.save(parity.random_model(CONFIGS[name], seed=1), directory)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (directory / "tokenizer.json").write_text(backend.to_str())


def open_engine(
    model: Path,
    quantization: Quantization = "none",
    dtype: str = "float32",
    *,
    deterministic: bool = False,
) -> TorchEngine:
    """An engine on one thread."""
    config = EngineConfig(
        model=str(model),
        dtype=dtype,
        quantization=quantization,
        deterministic=deterministic,
        block_tokens=4,
        pool_bytes=1 << 22,
        threads=1,
    )
    return open_torch_engine(config, show_progress=False)


def logits(engine: TorchEngine, chunk: int = len(TOKENS)) -> Tensor:
    """After each of `TOKENS`, computed so many at once: (tokens, vocabulary)."""
    pages = list(range(10, 20))
    return torch.cat(
        [
            engine.score(Slice(TOKENS[start : start + chunk], start, pages, ()))
            for start in range(0, len(TOKENS), chunk)
        ]
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square error over the standard deviation."""
    return float((found - expected).square().mean().sqrt() / expected.std())
