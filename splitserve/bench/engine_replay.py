"""Replays a workload on an engine of this process.

Tokens are stamped where the engine tells of them, on its own thread: what is measured is the
engine and its loop, and none of it waits for whoever measures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from splitserve.bench.pacing import Pacing
from splitserve.bench.record import RequestRecord
from splitserve.bench.workload import WorkItem, prompt_ids
from splitserve.engine import sequence
from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.protocol import Engine
from splitserve.errors import Unavailable
from splitserve.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)

OnDone = Callable[[RequestRecord], object]


class EngineReplay:
    """One engine's core, and the requests that are under way on it."""

    def __init__(self, engine: Engine, config: CoreConfig) -> None:
        self._vocab_size = engine.spec.vocab_size
        self._batch = config.max_batch
        self._longest = min(config.max_step_tokens, engine.spec.max_context_tokens - 8)
        self._core = EngineCore(engine, config, self._hear)
        self._core.start()
        self._records: dict[str, RequestRecord] = {}
        self._on_end: Callable[[RequestRecord], None] = lambda record: None

    def close(self) -> None:
        """End the loop. The engine stays open."""
        self._core.stop()

    def run(
        self,
        items: Sequence[WorkItem],
        pacing: Pacing,
        *,
        seed: int,
        sampling: SamplingParams = GREEDY,
        on_done: OnDone = lambda record: None,
    ) -> list[RequestRecord]:
        """One record a request, in the order of `items`. Prompts are made before the clock starts.
        Every output has its item's length, however it is drawn.

        Raises `Unavailable` if the loop fails.
        """
        prompts = self._prompts(items, seed)
        records = [RequestRecord(item.id, item.prompt_tokens, sent_s=0.0) for item in items]
        turns = threading.Semaphore(pacing.concurrency or len(items))
        left, all_ended = len(items), threading.Event()

        def ended(record: RequestRecord) -> None:
            nonlocal left
            turns.release()
            on_done(record)
            left -= 1
            if not left:
                all_ended.set()

        self._on_end = ended
        began_s = time.perf_counter()
        for index, item in enumerate(items):
            time.sleep(max(0.0, began_s + pacing.offsets_s[index] - time.perf_counter()))
            turns.acquire()
            params = replace(sampling, max_tokens=item.output_tokens, ignore_eos=True)
            self._submit(index, prompts[index], params, records[index])
        if items:
            all_ended.wait()
        return records

    def run_padded(self, items: Sequence[WorkItem], *, seed: int) -> list[RequestRecord]:
        """The baseline of in-flight batching: full batches, one after the other, each padded to
        its longest prompt and computed to its longest output. Only tokens that were asked for
        count.
        """
        records: list[RequestRecord] = []
        for first in range(0, len(items), self._batch):
            own = items[first : first + self._batch]
            prompt = max(item.prompt_tokens for item in own)
            output = max(item.output_tokens for item in own)
            padded = [WorkItem(item.id, prompt, output) for item in own]
            pacing = Pacing((0.0,) * len(own), None, "")
            done = self.run(padded, pacing, seed=seed + first)
            for item, record in zip(own, done, strict=True):
                record.prompt_tokens = item.prompt_tokens
                del record.token_times_s[item.output_tokens :]
                del record.token_counts[item.output_tokens :]
            records += done
        return records

    def warm_up(self) -> None:
        """Requests that are not measured: kernels are compiled and memory is taken for them."""
        lengths = [(min(17, self._longest), 4), (self._longest, 4)]
        items = [WorkItem(f"warm-{i}", *length) for i, length in enumerate(lengths)]
        self.run(items, Pacing((0.0,) * len(items), None, ""), seed=-1 & 0xFFFF)

    def _prompts(self, items: Sequence[WorkItem], seed: int) -> list[list[int]]:
        return [
            prompt_ids(index, item.prompt_tokens, self._vocab_size, seed)
            for index, item in enumerate(items)
        ]

    def _submit(
        self, index: int, prompt: list[int], params: SamplingParams, record: RequestRecord
    ) -> None:
        request = sequence.Sequence(f"{index}/{record.id}", prompt, params, seed=0)
        record.sent_s = time.perf_counter()
        self._records[request.id] = record
        try:
            self._core.submit(request)
        except Unavailable as error:
            raise Unavailable(f"the engine's loop has ended: {error.message}") from error

    def _hear(self, step: int, outputs: Sequence[sequence.SequenceOutput]) -> None:
        now = time.perf_counter()
        for output in outputs:
            record = self._records[output.sequence.id]
            if output.tokens:
                record.token_times_s.append(now)
                record.token_counts.append(len(output.tokens))
            if output.error:
                record.error = f"{output.error.code.name}: {output.error.message}"
            if output.error or output.finish_reason:
                record.ended_s = now
                del self._records[output.sequence.id]
                self._on_end(record)
