"""PrefillService: a prompt comes in, its first tokens go out, its KV goes to the store.

1. The request is checked, and the store asked for blocks of the prompt's prefix.
2. The prompt is queued in the core, which loads what the store has and computes the rest.
3. Its blocks are handed over as their layers are computed (`hand_over`).
4. The first tokens are answered as soon as they are drawn.
5. When the last block is committed, and read if it stays in the pool, or the call has failed, the
   pages are freed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import grpc
from opentelemetry import context as trace_context

from services.prefill.hand_over import HandOver
from services.prefill.job import Job
from services.prefill.recorder import Recorder
from splitserve import wire
from splitserve.engine.core import EngineCore
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.errors import SplitserveError, Unavailable
from splitserve.kv.client import KvStoreClient
from splitserve.kv.keys import chain_keys, root_key
from splitserve.kv.layout import Lease
from splitserve.kv.receipt import KvReceipt
from splitserve.rpc.deadline import remaining_s
from splitserve.sampling import SamplingLimits, check_prompt
from splitserve.v1 import prefill_pb2, prefill_pb2_grpc
from splitserve.worker.block_loader import BlockLoader
from splitserve.worker.relay import OutputRelay

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

LOOKUP_TIMEOUT_S = 0.25
PREFIX_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What every prompt on this worker is computed with."""

    core: EngineCore
    relay: OutputRelay
    recorder: Recorder
    spec: EngineSpec
    limits: SamplingLimits
    open_store: Callable[[Lease], Awaitable[KvStoreClient]]
    load_prefixes: bool


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """Messages to jobs and back."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._serials = count()
        self._draining = False
        self._open = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> prefill_pb2.PrefillResponse:
        """See prefill.proto."""
        if self._draining:
            raise Unavailable("the prefill worker is stopping; try another")
        self._open += 1
        self._idle.clear()
        try:
            return await self._prefill(request, context)
        finally:
            self._open -= 1
            self._note_idle()

    async def drain(self) -> None:
        """Take no new prompts; return once all that were taken have been handed over."""
        self._draining = True
        await self._idle.wait()

    async def _prefill(
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> prefill_pb2.PrefillResponse:
        job = await self._job_of(request)
        try:
            output = await job.first_tokens(remaining_s(context))
            receipt = await job.receipt()
        finally:
            self._close_later(job)
        return _response(output, receipt)

    async def _job_of(self, request: prefill_pb2.PrefillRequest) -> Job:
        bench = self._bench
        wire.check_request_id(request.request_id)
        params = wire.sampling_from_proto(request.sampling)
        prompt = list(request.prompt_token_ids)
        check_prompt(prompt, params, bench.limits, prefix="prompt_token_ids")
        seed = wire.seed_of(request.sampling)
        lease = wire.lease_from_proto(request.lease) if request.HasField("lease") else None
        hand_over = self._hand_over(lease, len(prompt)) if lease else None
        loader = await self._loader(lease, request.cache_salt, prompt) if lease else None
        sequence = Sequence(
            id=f"{request.request_id}#{next(self._serials)}",
            prompt=prompt,
            params=params,
            seed=seed,
            cache_salt=request.cache_salt,
            source=loader,
            sink=hand_over,
            prefill_choices=params.n,
        )
        return Job(
            request.request_id,
            sequence,
            core=bench.core,
            relay=bench.relay,
            recorder=bench.recorder,
            parent=trace_context.get_current(),
            hand_over=hand_over,
            loader=loader,
        )

    def _hand_over(self, lease: Lease, prompt_tokens: int) -> HandOver:
        bench = self._bench
        return HandOver(
            lease,
            prompt_tokens=prompt_tokens,
            spec=bench.spec,
            open_store=bench.open_store,
        )

    async def _loader(
        self, lease: Lease, cache_salt: bytes, prompt: list[int]
    ) -> BlockLoader | None:
        """A source for the prompt's prefix, if the store has any of it."""
        bench = self._bench
        block = bench.spec.block_tokens
        keys = chain_keys(root_key(bench.spec.fingerprint, cache_salt), prompt, block)
        reusable = keys[: (len(prompt) - 1) // block]
        if not bench.load_prefixes or not reusable:
            return None
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                store = await bench.open_store(lease)
                holders = await store.lookup(reusable)
        except (SplitserveError, TimeoutError) as error:
            _log.info("the store was not asked for the prefix: %s", error)
            return None
        if not holders.get(lease.store_address):
            return None
        return BlockLoader(
            lease,
            open_store=bench.open_store,
            loaded=bench.core.loaded,
            block_bytes=bench.spec.block_bytes,
            wait_for_writer=False,
            timeout_s=PREFIX_TIMEOUT_S,
        )

    def _close_later(self, job: Job) -> None:
        """Hand over what is left, and free the pages, after the answer."""
        task = asyncio.create_task(job.close(), name=f"close-{job.sequence.id}")
        self._closing.add(task)
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and (fault := task.exception()):
            _log.error("closing a prompt failed", exc_info=fault)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._open and not self._closing:
            self._idle.set()


def _response(output: SequenceOutput, receipt: KvReceipt | None) -> prefill_pb2.PrefillResponse:
    sequence = output.sequence
    queue_ns = sequence.scheduled_ns - sequence.submitted_ns
    compute_ns = sequence.first_token_ns - sequence.scheduled_ns
    return prefill_pb2.PrefillResponse(
        first_tokens=[
            prefill_pb2.FirstToken(
                token=wire.token_to_proto(token),
                finish_reason=wire.finish_reason_to_proto(reason),
            )
            for token, reason in zip(output.tokens, output.finish_reasons, strict=True)
        ],
        cached_tokens=sequence.num_cached,
        queue_ms=max(0, queue_ns) / 1e6,
        compute_ms=max(0, compute_ns) / 1e6,
        kv_receipt=receipt.to_proto() if receipt else None,
    )
