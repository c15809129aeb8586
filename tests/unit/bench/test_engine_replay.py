"""A workload on an engine of this process."""

from __future__ import annotations

import threading
from collections import abc
from collections.abc import Callable
from typing import Any

import pytest

from splitserve.bench.engine_replay import EngineReplay
from splitserve.bench.pacing import closed_loop
from splitserve.bench.workload import WorkItem
from splitserve.engine.core import CoreConfig
from splitserve.engine.fake import FakeEngine
from splitserve.engine.protocol import DrawnToken, LayersDone, Slice


class CountingEngine(FakeEngine):
    """Remembers how many sequences its steps had and what was drawn; fails where it is told to."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__(num_pages=4096)
        self.sequences: list[int] = []
        self.longest_prompt = 0
        self.drawn = 0
        self.before_first: Callable[[], object] = lambda: None
        self._fail_at = fail_at

    def step(
        self, slices: abc.Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        if not self.sequences:
            self.before_first()
        self.sequences.append(len(slices))
        if len(self.sequences) == self._fail_at:
            raise RuntimeError("device lost")
        ends = [part.start + len(part.token_ids) for part in slices if not part.start]
        self.longest_prompt = max([self.longest_prompt, *ends])
        self.drawn += sum(len(part.draws) for part in slices)
        return super().step(slices, layers_done)


ITEMS = [WorkItem(str(i), 5 + 3 * i, 4 + 5 * (i % 3)) for i in range(7)]
CONFIG = CoreConfig(max_batch=4, max_step_tokens=256, reuse_prefixes=False)


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def bench(engine: CountingEngine) -> abc.Iterator[EngineReplay]:
    bench = EngineReplay(engine, CONFIG)
    yield bench
    bench.close()


def test_every_token_is_stamped(bench: EngineReplay) -> None:
    done: list[str] = []
    pacing = closed_loop(len(ITEMS), 3)
    records = bench.run(ITEMS, pacing, seed=1, on_done=lambda record: done.append(record.id))
    assert [record.output_tokens for record in records] == [item.output_tokens for item in ITEMS]
    assert sorted(done) == [item.id for item in ITEMS]
    for record in records:
        times = [record.sent_s, *record.token_times_s, record.ended_s]
        assert times == sorted(times)
        assert record.error is None


def test_no_more_are_in_flight_than_the_pacing_says(
    bench: EngineReplay, engine: CountingEngine
) -> None:
    # The first step waits for the second request, so that there are two to be computed.
    submit, submitted = bench._submit, threading.Semaphore(0)

    def counted(*arguments: Any) -> None:
        submit(*arguments)
        submitted.release()

    bench._submit = counted  # type: ignore[method-assign]
    engine.before_first = lambda: [submitted.acquire(timeout=10) for _ in range(2)]
    bench.run(ITEMS, closed_loop(len(ITEMS), 2), seed=1)
    assert max(engine.sequences) == 2


def test_static_batches_are_padded_and_wait_for_their_longest(
    bench: EngineReplay, engine: CountingEngine
) -> None:
    records = bench.run_padded(ITEMS, seed=1)
    assert [record.output_tokens for record in records] == [item.output_tokens for item in ITEMS]
    assert [record.prompt_tokens for record in records] == [item.prompt_tokens for item in ITEMS]
    longest = [max(item.output_tokens for item in part) for part in (ITEMS[:4], ITEMS[4:])]
    assert engine.drawn == 4 * longest[0] + 3 * longest[1]
    assert max(record.sent_s for record in records[:4]) < min(r.sent_s for r in records[4:])
    assert engine.longest_prompt == ITEMS[-1].prompt_tokens


def test_a_failed_step_is_a_record_not_an_exception() -> None:
    engine = CountingEngine(fail_at=3)
    bench = EngineReplay(engine, CONFIG)
    records = bench.run(ITEMS[:1], closed_loop(1, 1), seed=1)
    bench.close()
    assert records[0].error is not None
    assert records[0].error.startswith("INTERNAL")


def test_closing_ends_the_loop(bench: EngineReplay) -> None:
    bench.warm_up()
    bench.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
