"""The one model that is served: its name and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.router.workers import WorkerPool
from splitserve.errors import ModelNotFound
from splitserve.sampling import SamplingLimits
from splitserve.v1 import inference_pb2

UNKNOWN_LIMIT = 2**31 - 1
"""Where neither flags nor workers tell a limit: the workers then check it themselves."""


@dataclass(frozen=True)
class ModelCaps:
    """The server's caps, over the model's own. 0 means that it is not known."""

    vocab_size: int
    max_context_tokens: int
    max_tokens: int
    default_max_tokens: int
    max_choices: int


class ServedModel:
    """What clients may ask of the model, as far as files, flags and workers tell."""

    def __init__(self, name: str, caps: ModelCaps, pools: Sequence[WorkerPool]) -> None:
        self.name = name
        self.default_max_tokens = caps.default_max_tokens
        self._caps = caps
        self._pools = pools

    def check_name(self, asked: str) -> None:
        """Raise ModelNotFound unless it is this model, or none was named."""
        if asked and asked != self.name:
            raise ModelNotFound(
                f"model {asked[:80]!r} is not served here; ListModels tells which is"
            )

    def limits(self) -> SamplingLimits:
        """The limits of a request made now."""
        return SamplingLimits(
            vocab_size=self._caps.vocab_size or UNKNOWN_LIMIT,
            max_context_tokens=self._max_context_tokens() or UNKNOWN_LIMIT,
            max_tokens=self._caps.max_tokens,
            max_choices=self._caps.max_choices,
        )

    def describe(
        self, *, has_tokenizer: bool, has_chat_template: bool, ready: bool
    ) -> inference_pb2.Model:
        """The entry of ListModels."""
        return inference_pb2.Model(
            name=self.name,
            max_context_tokens=self._max_context_tokens(),
            vocab_size=self._caps.vocab_size,
            has_tokenizer=has_tokenizer,
            has_chat_template=has_chat_template,
            ready=ready,
        )

    def _max_context_tokens(self) -> int:
        """The least of what flags, files and workers say; 0 if none says anything."""
        told = [self._caps.max_context_tokens]
        for pool in self._pools:
            told += [w.state.max_context_tokens for w in pool.known() if w.state is not None]
        return min((tokens for tokens in told if tokens), default=0)
