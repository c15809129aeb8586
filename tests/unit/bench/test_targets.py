"""An engine of this process as a target: its deltas cross from threads into the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from splitserve.bench.targets import EngineTarget, TargetInfo
from splitserve.errors import InvalidRequest
from splitserve.llm import LLM
from splitserve.outputs import ChoiceDelta, OutputDelta
from splitserve.sampling import SamplingParams


class ThreadedEngine:
    """Streams `max_tokens` tokens; `closed` is set when a stream is left or has ended."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.stopped = False

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[OutputDelta]:
        if not prompt:
            raise InvalidRequest.single("prompt", "is empty")
        try:
            for index in range(params.max_tokens or 0):
                yield OutputDelta("r", [ChoiceDelta(0, index, [index])])
        finally:
            self.closed.set()

    def shutdown(self) -> None:
        self.stopped = True


def make() -> tuple[ThreadedEngine, EngineTarget]:
    engine = ThreadedEngine()
    return engine, EngineTarget(cast(LLM, engine), TargetInfo("test", 100, 1000))


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


async def test_every_delta_arrives_in_its_order():
    engine, target = make()
    deltas = [delta async for delta in target.stream([1], params(50))]
    assert [delta.choices[0].token_ids for delta in deltas] == [[i] for i in range(50)]
    assert (await target.info()).vocab_size == 100
    await target.close()
    assert engine.stopped


async def test_what_the_engine_raises_is_raised():
    _, target = make()
    with pytest.raises(InvalidRequest, match="is empty"):
        [delta async for delta in target.stream([], params(1))]


async def test_leaving_early_closes_the_engines_stream():
    engine, target = make()
    stream: Any = target.stream([1], params(10_000_000))
    async with contextlib.aclosing(stream):
        assert (await anext(stream)).choices[0].token_ids == [0]
    assert await asyncio.to_thread(engine.closed.wait, 10)
