"""Sends the requests of a workload at their times and records what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from splitserve.bench.pacing import Pacing
from splitserve.bench.record import RequestRecord
from splitserve.bench.targets import Target
from splitserve.bench.workload import WorkItem, prompt_ids
from splitserve.errors import SplitserveError
from splitserve.sampling import SamplingParams

OnDone = Callable[[RequestRecord], object]


async def replay(
    items: Sequence[WorkItem],
    pacing: Pacing,
    target: Target,
    *,
    vocab_size: int,
    seed: int,
    on_done: OnDone = lambda record: None,
) -> list[RequestRecord]:
    """One record a request, in the order of `items`. A failed request is a record, no exception.

    Prompts are made before the clock starts.
    """
    prompts = [
        prompt_ids(index, item.prompt_tokens, vocab_size, seed) for index, item in enumerate(items)
    ]
    slots = asyncio.Semaphore(pacing.concurrency or len(items))
    began_s = time.perf_counter()

    async def one(index: int) -> RequestRecord:
        await asyncio.sleep(began_s + pacing.offsets_s[index] - time.perf_counter())
        async with slots:
            record = await _request(items[index], prompts[index], target)
        on_done(record)
        return record

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index)) for index in range(len(items))]
    return [task.result() for task in tasks]


async def warm_up(target: Target, *, vocab_size: int) -> None:
    """One short request that is not measured. Raises SplitserveError if it fails."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt = prompt_ids(0, 8, vocab_size, seed=-1 & 0xFFFF)
    async with contextlib.aclosing(target.stream(prompt, params)) as deltas:
        async for _ in deltas:
            pass


async def _request(item: WorkItem, prompt: list[int], target: Target) -> RequestRecord:
    params = SamplingParams(temperature=0.0, max_tokens=item.output_tokens, ignore_eos=True)
    record = RequestRecord(item.id, item.prompt_tokens, sent_s=time.perf_counter())
    try:
        async with contextlib.aclosing(target.stream(prompt, params)) as deltas:
            async for delta in deltas:
                count = sum(len(choice.token_ids) for choice in delta.choices)
                if count:
                    record.token_times_s.append(time.perf_counter())
                    record.token_counts.append(count)
        if record.output_tokens != item.output_tokens:
            record.error = f"{record.output_tokens} tokens came, {item.output_tokens} were due"
    except SplitserveError as error:
        record.error = f"{error.code.name}: {error.message}"
    record.ended_s = time.perf_counter()
    return record
