"""Reads from the checkpoint what the router needs of a model: tokenizer, template, limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.router.config import RouterConfig
from services.router.tokenization import PromptEncoder
from splitserve.chat import ChatTemplate
from splitserve.chat_process import ChatProcess
from splitserve.errors import ConfigError
from splitserve.models.config import ModelConfig
from splitserve.tokenizer import Tokenizer
from splitserve.weights.gguf_config import read_gguf_config
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.hf_config import read_hf_config


@dataclass(frozen=True)
class LoadedModel:
    """What was read. 0 stands for a limit that nothing tells. `chat` is to be closed."""

    encoder: PromptEncoder
    chat: ChatProcess | None
    vocab_size: int
    max_context_tokens: int


def load_model(config: RouterConfig) -> LoadedModel:
    """Reads `--model`; flags go before what it says. Raises ConfigError and CheckpointError."""
    if config.model is None:
        if not config.skip_tokenizer_init:
            raise ConfigError("model: give --model, or --skip-tokenizer-init for token ids only")
        encoder = PromptEncoder(None, None)
        return LoadedModel(encoder, None, config.vocab_size, config.max_context_tokens)
    shape = _read_shape(config.model)
    tokenizer, chat = None, None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer.from_checkpoint(config.model)
        template = ChatTemplate.from_checkpoint(config.model)
        chat = ChatProcess(template) if template is not None else None
    return LoadedModel(
        PromptEncoder(tokenizer, chat),
        chat,
        config.vocab_size or shape.vocab_size,
        config.max_context_tokens or shape.max_context_tokens,
    )


def _read_shape(path: Path) -> ModelConfig:
    return read_hf_config(path) if path.is_dir() else read_gguf_config(read_gguf(path))
