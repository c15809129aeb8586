"""What a workload is replayed against: a running suite, or an engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Protocol

from splitserve.client import AsyncClient
from splitserve.errors import ModelNotFound
from splitserve.outputs import OutputDelta
from splitserve.sampling import SamplingParams

if TYPE_CHECKING:
    from splitserve.llm import LLM


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


class EngineTarget:
    """An `LLM` of this process, a thread a request in flight."""

    def __init__(self, llm: LLM, info: TargetInfo) -> None:
        self._llm = llm
        self._info = info

    async def info(self) -> TargetInfo:
        """See `Target`."""
        return self._info

    async def stream(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[OutputDelta]:
        """See `Target`."""
        loop = asyncio.get_running_loop()
        # None is the end; an exception is raised where the deltas are read.
        arrived: asyncio.Queue[OutputDelta | BaseException | None] = asyncio.Queue()
        left = Event()

        def pump() -> None:
            last: BaseException | None = None
            try:
                for delta in self._llm.stream(prompt, params):
                    loop.call_soon_threadsafe(arrived.put_nowait, delta)
                    if left.is_set():
                        break
            except BaseException as error:
                last = error
            # The loop may be closed already where the bench was interrupted.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrived.put_nowait, last)

        # A daemon: one that waits for a token that never comes must not keep the process.
        Thread(target=pump, name="bench-request", daemon=True).start()
        try:
            while (delta := await arrived.get()) is not None:
                if isinstance(delta, BaseException):
                    raise delta
                yield delta
        finally:
            left.set()

    async def close(self) -> None:
        """See `Target`."""
        self._llm.shutdown()
