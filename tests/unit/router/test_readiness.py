"""Ready follows the canary."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.router import readiness as module
from services.router.readiness import Readiness
from splitserve.errors import NoWorker


class Script:
    """A canary that does what each line says, then waits for ever."""

    def __init__(self, *outcomes: Exception | bool) -> None:
        self.outcomes = list(outcomes)
        self.done = asyncio.Event()

    async def __call__(self, timeout_s: float) -> bool:
        if not self.outcomes:
            self.done.set()
            await asyncio.Event().wait()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)


@dataclass
class Told:
    ready: list[bool] = field(default_factory=list)
    split: list[bool] = field(default_factory=list)

    def watch(self, script: Script, **options: Any) -> Readiness:
        options = {"interval_s": 0.001, "timeout_s": 5, "split_wait_s": 1000, **options}
        return Readiness(script, self.ready.append, self.split.append, **options)


async def told_by(
    script: Script, then: Callable[[Readiness], None] = lambda _: None, **options: Any
) -> Told:
    told = Told()
    readiness = told.watch(script, **options)
    task = asyncio.create_task(readiness.run())
    await asyncio.wait_for(script.done.wait(), 5)
    then(readiness)
    task.cancel()
    await asyncio.wait({task})
    return told


@pytest.mark.usefixtures("at_once")
async def test_follows_the_canary() -> None:
    script = Script(NoWorker("none"), True, True, RuntimeError("bug"), NoWorker("x"), True)
    told = await told_by(script)
    assert told.ready == [True, False, True]
    assert told.split == [False, True, True, False, False, True]


@pytest.mark.usefixtures("at_once")
async def test_once_the_split_has_worked_it_is_no_condition() -> None:
    told = await told_by(Script(True, False, NoWorker("x"), False, True))
    assert told.ready == [True, False, True]
    assert told.split == [True, False, False, False, True]


@pytest.mark.usefixtures("at_once")
async def test_the_first_readiness_waits_for_the_split() -> None:
    assert (await told_by(Script(False, False, False))).ready == []
    assert (await told_by(Script(False, False, True))).ready == [True]


@pytest.mark.usefixtures("at_once")
async def test_the_wait_for_the_split_is_bounded_and_begins_with_the_first_success() -> None:
    now = iter([100.0, 104.9, 105.0])
    script = Script(NoWorker("x"), False, False, False)
    ready: list[bool] = []

    def clock() -> float:
        ready.append(readiness.ready)
        return next(now)

    told = Told()
    readiness = told.watch(script, split_wait_s=5, clock=clock)
    task = asyncio.create_task(readiness.run())
    await asyncio.wait_for(script.done.wait(), 5)
    task.cancel()
    await asyncio.wait({task})
    assert ready == [False, False, False]
    assert told.ready == [True]


@pytest.mark.usefixtures("at_once")
async def test_stop_is_final() -> None:
    def stop(readiness: Readiness) -> None:
        readiness.stop()
        assert not readiness.ready

    assert (await told_by(Script(True), stop)).ready == [True, False]


@pytest.mark.usefixtures("at_once")
async def test_no_answer_in_time() -> None:
    told = Told()
    script = Script()
    readiness = told.watch(script, timeout_s=0.01)
    task = asyncio.create_task(readiness.run())
    await asyncio.wait_for(script.done.wait(), 5)
    script.done.clear()
    await asyncio.wait_for(script.done.wait(), 5)
    task.cancel()
    await asyncio.wait({task})
    assert told.ready == []
    assert not readiness.ready
