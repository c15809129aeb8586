"""What a workload is replayed against over the network: a running suite."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from splitserve.client import AsyncClient
from splitserve.errors import ModelNotFound
from splitserve.outputs import OutputDelta
from splitserve.sampling import SamplingParams


@dataclass(frozen=True)
class TargetInfo:
    """What a target serves."""

    description: str
    vocab_size: int
    max_context_tokens: int


class Target(Protocol):
    """Answers prompts. Used inside one event loop."""

    async def info(self) -> TargetInfo:
        """What it serves. Raises SplitserveError if it cannot be reached."""

    def stream(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[OutputDelta]:
        """The answer as it is made. Raises SplitserveError. Closing it cancels."""

    async def close(self) -> None:
        """Lets go of it."""


class SuiteTarget:
    """A running suite, by its router."""

    def __init__(self, client: AsyncClient, model: str, address: str, timeout_s: float) -> None:
        self._client = client
        self._model = model
        self._address = address
        self._timeout_s = timeout_s

    async def info(self) -> TargetInfo:
        """See `Target`."""
        for card in await self._client.models():
            if self._model in ("", card.name):
                return TargetInfo(
                    f"{card.name} at {self._address}", card.vocab_size, card.max_context_tokens
                )
        raise ModelNotFound(f"{self._address} does not serve {self._model!r}")

    def stream(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[OutputDelta]:
        """See `Target`."""
        return self._client.stream(prompt, params, model=self._model, timeout=self._timeout_s)

    async def close(self) -> None:
        """See `Target`."""
        await self._client.close()
