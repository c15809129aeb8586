"""SIGTERM under load: what runs is finished, nothing new is taken on, the process ends well."""

from __future__ import annotations

import asyncio
import signal

import pytest

from splitserve.client import AsyncClient
from splitserve.errors import Unavailable

from ..leftovers import nothing_held
from ..load import Load, ask, check
from ..suite import Suite
from .tiers import AFTER_LEASE_S, start_tiers

DEADLINE_S = 20.0
SLOW = ("--fake-step-ms", "5")


async def test_tiers_that_drain_lose_no_request(suite: Suite) -> None:
    """One after the other they go; prompts are computed, and decoded, by whom is left."""
    tiers = await start_tiers(suite, *SLOW, num_decode=2)
    load = Load(tiers.router, clients=16, deadline_s=DEADLINE_S)
    async with load.running():
        for leaving in (tiers.decode, tiers.prefill, tiers.kvstore):
            served = load.ends["OK"]
            await load.until(lambda goal=served + 32: load.ends["OK"] >= goal)
            assert await suite.stop(leaving) == 0, leaving.text()
        served = load.ends["OK"]
        await load.until(lambda: load.ends["OK"] >= served + 32)
    assert set(load.ends) == {"OK"}
    await nothing_held(*tiers.spare, tiers.router, within_s=AFTER_LEASE_S)


async def test_a_router_that_drains_finishes_its_streams(suite: Suite) -> None:
    tiers = await start_tiers(suite, "--fake-step-ms", "20")
    prompts = [[seed + 1, *range(1, 50)] for seed in range(16)]
    streaming = [asyncio.Event() for _ in prompts]
    async with tiers.router.channel() as channel:
        asking = [
            asyncio.create_task(ask(channel, prompt, 100, DEADLINE_S, on_news=begun.set))
            for prompt, begun in zip(prompts, streaming, strict=True)
        ]
        for begun in streaming:
            await begun.wait()
        async with AsyncClient(tiers.router.address) as late:
            await late.models()
            tiers.router.process.send_signal(signal.SIGTERM)
            await tiers.router.wait_health(serving=False)
            with pytest.raises(Unavailable):
                await late.generate([1, 2, 3], timeout=DEADLINE_S)
        assert not any(task.done() for task in asking)
        for prompt, task in zip(prompts, asking, strict=True):
            answer = await task
            assert answer.status == "OK", answer.details
            check(answer, prompt, 100)
    async with asyncio.timeout(DEADLINE_S):
        assert await tiers.router.process.wait() == 0
    await nothing_held(tiers.prefill, tiers.decode, tiers.kvstore, within_s=AFTER_LEASE_S)
