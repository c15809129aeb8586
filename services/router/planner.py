"""Which way a request takes: its workers, and the lease under which KV goes between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from services.router.policy import Candidate, Policy
from services.router.request import Request
from services.router.stores import HeldLease, Stores
from services.router.workers import Worker, WorkerPool
from splitserve.errors import NoWorker, SplitserveError
from splitserve.kv.keys import chain_keys, root_key

_log = logging.getLogger(__name__)

MAX_LOOKUPS = 8
"""Most directories asked for one request. Where there are more, they share one in Redis."""


@dataclass(frozen=True)
class HandOver:
    """A prefill worker, and the lease of its store under which it hands the prompt's KV over."""

    prefill: Worker
    lease: HeldLease


class Plan:
    """A request's workers. Counts on the decode worker until it is closed.

    Without `hand_over` the decode worker computes the prompt itself. If the prefill worker is
    lost the lease ends at once: the decode worker then stops to wait for blocks that nobody
    writes any more and computes the rest.
    """

    def __init__(self, decode: Worker, hand_over: HandOver | None = None) -> None:
        self.decode = decode
        self.hand_over = hand_over
        self._open = True
        decode.own_requests += 1
        if hand_over is not None:
            hand_over.prefill.on_lost.add(self.release_lease)

    def release_lease(self) -> None:
        """The KV has arrived, or never will. Idempotent."""
        if self.hand_over is not None:
            self.hand_over.prefill.on_lost.discard(self.release_lease)
            self.hand_over.lease.release()

    def close(self) -> None:
        """The request has left. Idempotent."""
        self.release_lease()
        if self._open:
            self._open = False
            self.decode.own_requests -= 1


class Planner:
    """Makes plans from what workers report and what the stores' directories know.

    A prompt whose uncached part on the chosen decode worker is below `local_prefill_tokens`, and
    any prompt while the prefill tier or the store is out of service, is computed there. A tier
    that is there but overloaded is not bypassed: that would only overload the next one.
    """

    def __init__(
        self,
        prefill: WorkerPool,
        decode: WorkerPool,
        stores: Stores,
        policy: Policy,
        *,
        local_prefill_tokens: int,
        worker_wait_s: float,
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._stores = stores
        self._policy = policy
        self._local_prefill_tokens = local_prefill_tokens
        self._worker_wait_s = worker_wait_s

    async def plan(
        self, request: Request, avoid: Collection[str] = (), *, must_split: bool = False
    ) -> Plan:
        """The way of a new request. Workers at addresses in `avoid` are taken only if need be.

        `must_split` rules out that the decode worker computes the prompt. Raises NoWorker.
        """
        decoders = _without(await self._decoders(request), avoid) or self._decode.ready()
        ready = self._prefill.ready()
        prefillers = _without(ready, avoid) or ready
        short = len(request.prompt) < self._local_prefill_tokens
        if must_split:
            if not prefillers:
                raise NoWorker("no prefill worker is ready; start one or wait for it")
        elif short or not prefillers:
            return Plan(self._least_loaded(decoders, request))
        return await self._split(request, prefillers, decoders, must_split)

    async def plan_resume(self, request: Request, avoid: Collection[str] = ()) -> Plan:
        """The way of a request whose decode worker was lost. Raises NoWorker."""
        decoders = await self._decoders(request)
        return Plan(self._least_loaded(_without(decoders, avoid) or decoders, request))

    async def _decoders(self, request: Request) -> list[Worker]:
        wait_s = min(self._worker_wait_s, request.remaining_s())
        ready = await self._decode.wait_ready(wait_s)
        if not ready:
            raise NoWorker(f"no decode worker became ready within {wait_s:.1f} s; retry later")
        return ready

    async def _split(
        self,
        request: Request,
        prefillers: list[Worker],
        decoders: list[Worker],
        must_split: bool,
    ) -> Plan:
        num_tokens = len(request.prompt)
        likely = min(prefillers, key=lambda w: (w.queued_tokens, w.own_requests))
        prefillers, matching = _same_layout(likely, prefillers), _same_layout(likely, decoders)
        if not matching and must_split:
            raise NoWorker("no decode worker has the KV layout of the prefill workers")
        if not matching:
            return Plan(self._least_loaded(decoders, request))
        decoders = matching
        # The lease is asked for while the directory is: most often it is of the right store.
        granting = asyncio.create_task(self._grant(likely))
        try:
            cached = await self._cached_tokens(request, likely, [*prefillers, *decoders])
            lease = await granting
        except BaseException:
            self._stores.discard(granting)
            raise
        decode = self._policy.choose_decode(
            [Candidate(w, cached.get(w.id, 0)) for w in decoders], num_tokens
        )
        if not must_split and num_tokens - decode.cached_tokens < self._local_prefill_tokens:
            _release(lease)
            return Plan(decode.worker)
        prefill = self._policy.choose_prefill(
            [Candidate(w, _best_prefix(w, cached)) for w in prefillers], num_tokens
        )
        lease = await self._moved(lease, prefill.worker)
        if lease is not None:
            return Plan(decode.worker, HandOver(prefill.worker, lease))
        if must_split:
            raise NoWorker("the KV store of the prefill worker grants no lease")
        return Plan(decode.worker)

    async def _moved(self, lease: HeldLease | None, prefill: Worker) -> HeldLease | None:
        """A lease of the store that the prefill worker writes to, in place of another's."""
        address = prefill.state.store_address if prefill.state is not None else ""
        if lease is not None and lease.store_address == address:
            return lease
        _release(lease)
        return await self._grant(prefill)

    async def _grant(self, worker: Worker) -> HeldLease | None:
        """A lease of the worker's store; None if that store is out of service."""
        if worker.state is None or not worker.state.store_address:
            return None
        try:
            return await self._stores.grant(worker.state.store_address)
        except SplitserveError as error:
            _log.debug("store %s grants no lease: %s", worker.state.store_address, error.message)
            return None

    async def _cached_tokens(
        self, request: Request, reference: Worker, workers: Sequence[Worker]
    ) -> dict[str, int]:
        """Prompt tokens that each holder has, by worker id or store address."""
        if reference.state is None:
            return {}
        layout = reference.state.kv_layout
        if not layout.block_tokens:
            return {}
        root = root_key(layout.model_fingerprint, request.cache_salt)
        keys = chain_keys(root, request.prompt, layout.block_tokens)
        addresses = {w.state.store_address for w in workers if w.state is not None} - {""}
        blocks = await self._stores.lookup(sorted(addresses)[:MAX_LOOKUPS], keys)
        most = len(request.prompt)
        return {holder: min(n * layout.block_tokens, most) for holder, n in blocks.items()}

    def _least_loaded(self, decoders: Sequence[Worker], request: Request) -> Worker:
        candidates = [Candidate(worker) for worker in decoders]
        return self._policy.choose_decode(candidates, len(request.prompt)).worker


def _release(lease: HeldLease | None) -> None:
    if lease is not None:
        lease.release()


def _without(workers: list[Worker], avoid: Collection[str]) -> list[Worker]:
    return [worker for worker in workers if worker.address not in avoid]


def _same_layout(reference: Worker, workers: list[Worker]) -> list[Worker]:
    """Workers that can read what `reference` writes; during an update of the model not all can."""
    if reference.state is None:
        return workers
    layout = reference.state.kv_layout
    return [w for w in workers if w.state is not None and w.state.kv_layout == layout]


def _best_prefix(worker: Worker, cached: dict[str, int]) -> int:
    """A prefill worker need not compute what is in its own pool or in its store."""
    store = worker.state.store_address if worker.state is not None else ""
    return max(cached.get(worker.id, 0), cached.get(store, 0))
