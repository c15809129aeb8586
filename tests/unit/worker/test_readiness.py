from __future__ import annotations

import asyncio

import pytest

from splitserve.engine.core import CoreConfig, CoreStats, EngineCore
from splitserve.engine.fake import FakeEngine
from splitserve.engine.sequence import Sequence
from splitserve.sampling import SamplingParams
from splitserve.worker import readiness as module
from splitserve.worker.readiness import Readiness
from splitserve.worker.relay import OutputRelay


class FaultyEngine(FakeEngine):
    """Fails every step as long as `broken`."""

    broken = False

    def step(self, slices, layers_done=None):
        if self.broken:
            raise RuntimeError("out of order")
        return super().step(slices, layers_done)


class Rig:
    def __init__(self, *, prefill: bool) -> None:
        self.engine = FaultyEngine()
        self.relay = OutputRelay(asyncio.get_running_loop())
        self.core = EngineCore(self.engine, CoreConfig(), self.relay)
        self.changes: asyncio.Queue[bool] = asyncio.Queue()
        self.stats: list[CoreStats] = []
        self.readiness = Readiness(
            self.core,
            self.relay,
            prefill=prefill,
            stuck_after_s=10,
            on_ready=self.changes.put_nowait,
            on_stats=self.stats.append,
        )

    async def next_change(self) -> bool:
        return await asyncio.wait_for(self.changes.get(), 5)


@pytest.fixture(params=[True, False], ids=["prefill", "decode"])
async def rig(request, monkeypatch):
    monkeypatch.setattr(module, "CANARY_RETRY_S", 0.01)
    monkeypatch.setattr(module, "CHECK_INTERVAL_S", 0.01)
    made = Rig(prefill=request.param)
    made.core.start()
    yield made
    await made.readiness.stop()
    await asyncio.to_thread(made.core.stop)


async def test_ready_after_a_generation_and_never_while_draining(rig: Rig) -> None:
    assert not rig.readiness.ready
    rig.readiness.start()
    assert await rig.next_change() is True
    assert rig.core.stats().steps >= 1
    assert rig.core.stats().free_pages == rig.core.stats().total_pages
    rig.readiness.drain()
    assert await rig.next_change() is False
    assert not rig.readiness.ready
    assert rig.changes.empty()


async def test_not_ready_until_a_generation_succeeds(rig: Rig) -> None:
    rig.engine.broken = True
    rig.readiness.start()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rig.changes.get(), 0.1)
    rig.engine.broken = False
    assert await rig.next_change() is True


async def test_a_failed_step_takes_readiness_away_until_the_next_canary(rig: Rig) -> None:
    rig.readiness.start()
    assert await rig.next_change() is True
    rig.engine.broken = True
    rig.core.submit(Sequence("s", [1], SamplingParams(max_tokens=5), 0))
    assert await rig.next_change() is False
    rig.engine.broken = False
    assert await rig.next_change() is True
