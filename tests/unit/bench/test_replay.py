"""Requests are sent as paced, and whatever happens to one is its record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from splitserve.bench.pacing import closed_loop, recorded
from splitserve.bench.replay import replay, warm_up
from splitserve.bench.targets import TargetInfo
from splitserve.bench.workload import WorkItem
from splitserve.errors import Overloaded
from splitserve.outputs import ChoiceDelta, OutputDelta
from splitserve.sampling import SamplingParams


class EchoTarget:
    """Answers with all tokens in one message after the first; counts what is in flight."""

    def __init__(self, fail_prompts_of: int = 0, short_by: int = 0) -> None:
        self.fail_prompts_of = fail_prompts_of
        self.short_by = short_by
        self.in_flight = 0
        self.most_in_flight = 0
        self.seen: list[tuple[int, SamplingParams]] = []

    async def info(self) -> TargetInfo:
        return TargetInfo("echo", 100, 1000)

    async def stream(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[OutputDelta, None]:
        self.seen.append((len(prompt), params))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            if len(prompt) == self.fail_prompts_of:
                raise Overloaded("full", 1.0)
            yield OutputDelta("r", [ChoiceDelta(0, 0, [1])], seed=1)
            rest = (params.max_tokens or 0) - 1 - self.short_by
            if rest > 0:
                yield OutputDelta("r", [ChoiceDelta(0, 1, [2] * rest)])
            yield OutputDelta("r", [ChoiceDelta(0, 0, [], finish_reason="length")])
        finally:
            self.in_flight -= 1

    async def close(self) -> None:
        """Nothing to let go of."""


async def test_every_request_is_sent_with_its_lengths_and_no_more_in_flight_than_allowed():
    target = EchoTarget()
    items = [WorkItem(str(i), 2 + i, 3) for i in range(8)]
    done: list[str] = []
    records = await replay(
        items,
        closed_loop(8, 3),
        target,
        vocab_size=100,
        seed=0,
        on_done=lambda record: done.append(record.id),
    )
    assert [record.id for record in records] == [item.id for item in items]
    assert sorted(done) == [item.id for item in items]
    assert [record.token_counts for record in records] == [[1, 2]] * 8
    assert all(record.error is None for record in records)
    assert target.most_in_flight == 3
    assert sorted(count for count, _ in target.seen) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert all(p.ignore_eos and p.greedy and p.max_tokens == 3 for _, p in target.seen)


async def test_failed_and_short_answers_are_records():
    items = [WorkItem("bad", 7, 2), WorkItem("good", 5, 2)]
    bad, good = await replay(
        items, closed_loop(2, 2), EchoTarget(fail_prompts_of=7), vocab_size=100, seed=0
    )
    assert bad.error == "RESOURCE_EXHAUSTED: full"
    assert good.error is None
    [short] = await replay(
        [WorkItem("s", 5, 4)], closed_loop(1, 1), EchoTarget(short_by=2), vocab_size=100, seed=0
    )
    assert short.error == "2 tokens came, 4 were due"


async def test_recorded_arrivals_are_kept():
    items = [WorkItem("a", 1, 1, 0.0), WorkItem("b", 1, 1, 0.05)]
    first, second = await replay(items, recorded(items, 1.0), EchoTarget(), vocab_size=100, seed=0)
    assert second.sent_s - first.sent_s == pytest.approx(0.05, abs=0.045)
    assert second.sent_s - first.sent_s > 0.03


async def test_warming_up_raises_what_goes_wrong():
    await warm_up(EchoTarget(), vocab_size=100)
    with pytest.raises(Overloaded):
        await warm_up(EchoTarget(fail_prompts_of=8), vocab_size=100)
