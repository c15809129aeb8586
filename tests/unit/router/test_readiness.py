"""Ready follows the canary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from services.router import readiness as module
from services.router.readiness import Readiness
from splitserve.errors import NoWorker


class Script:
    """A canary that does what each line says, then waits for ever."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.done = asyncio.Event()

    async def __call__(self, timeout_s: float) -> None:
        if not self.outcomes:
            self.done.set()
            await asyncio.Event().wait()
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)


async def told_by(script: Script, then: Callable[[Readiness], None] = lambda _: None) -> list[bool]:
    told: list[bool] = []
    readiness = Readiness(script, told.append, interval_s=0.001, timeout_s=5)
    task = asyncio.create_task(readiness.run())
    await asyncio.wait_for(script.done.wait(), 5)
    then(readiness)
    task.cancel()
    await asyncio.wait({task})
    return told


@pytest.mark.usefixtures("at_once")
async def test_follows_the_canary() -> None:
    script = Script(NoWorker("none"), None, None, RuntimeError("bug"), NoWorker("x"), None)
    assert await told_by(script) == [True, False, True]


@pytest.mark.usefixtures("at_once")
async def test_stop_is_final() -> None:
    def stop(readiness: Readiness) -> None:
        readiness.stop()
        assert not readiness.ready

    assert await told_by(Script(None), stop) == [True, False]


@pytest.mark.usefixtures("at_once")
async def test_no_answer_in_time() -> None:
    told: list[bool] = []
    script = Script()
    readiness = Readiness(script, told.append, interval_s=0.001, timeout_s=0.01)
    task = asyncio.create_task(readiness.run())
    await asyncio.wait_for(script.done.wait(), 5)
    script.done.clear()
    await asyncio.wait_for(script.done.wait(), 5)
    task.cancel()
    await asyncio.wait({task})
    assert told == []
    assert not readiness.ready
