"""Prompts to token ids, away from the event loop where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from services.router.choice import NoText, TextStream
from splitserve.detokenizer import IncrementalDetokenizer
from splitserve.errors import InvalidRequest
from splitserve.sampling import SamplingParams
from splitserve.tokenizer import Tokenizer
from splitserve.v1 import inference_pb2

INLINE_CHARS = 2048
"""Shorter text is tokenised at once: it takes less than the way to a thread and back."""

NUM_THREADS = 2


class ChatRenderer(Protocol):
    """A model's chat template, such as `splitserve.chat_process.ChatProcess`."""

    async def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, special tokens spelled out. Raises InvalidRequest."""
        ...


class PromptEncoder:
    """Turns any prompt into token ids. Without a tokenizer only token ids are taken."""

    def __init__(self, tokenizer: Tokenizer | None, chat: ChatRenderer | None) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")

    @property
    def has_tokenizer(self) -> bool:
        """Whether text is taken."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations are taken."""
        return self._tokenizer is not None and self._chat is not None

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, message: inference_pb2.GenerateRequest) -> list[int]:
        """The prompt's token ids. Raises InvalidRequest for what cannot be one."""
        kind = message.WhichOneof("prompt")
        if kind == "tokens":
            return list(message.tokens.ids)
        if kind == "text":
            text = message.text
            tokenizer = self._tokenizer_for("text")
            return await self._away(len(text), lambda: tokenizer.encode(text))
        if kind == "chat":
            return await self._encode_chat(message.chat)
        raise InvalidRequest.single("prompt", "one of text, chat and tokens must be set")

    def texts(self, params: SamplingParams, *, keep_special_tokens: bool) -> list[TextStream]:
        """A fresh detokenizer for each choice."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return [NoText() for _ in range(params.n)]
        skip = not keep_special_tokens
        return [IncrementalDetokenizer(tokenizer, params.stop, skip) for _ in range(params.n)]

    async def _encode_chat(self, chat: inference_pb2.ChatPrompt) -> list[int]:
        tokenizer = self._tokenizer_for("chat")
        if self._chat is None:
            raise InvalidRequest.single("chat", "the model has no chat template; send text")
        generate = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
        text = await self._chat.render(
            [{"role": message.role, "content": message.content} for message in chat.messages],
            add_generation_prompt=generate,
        )
        return await self._away(len(text), lambda: tokenizer.encode(text, add_special_tokens=False))

    def _tokenizer_for(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest.single(field, "this server has no tokenizer; send tokens")
        return self._tokenizer

    async def _away(self, chars: int, encode: Callable[[], list[int]]) -> list[int]:
        if chars <= INLINE_CHARS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
