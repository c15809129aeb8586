"""Which way a request takes: its workers, and the lease under which KV goes between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from services.router.overflow import Overflow
from services.router.policy import Candidate, Policy
from services.router.request import Request
from services.router.stores import HeldLease, Stores
from services.router.workers import Claim, Worker, WorkerPool
from splitserve.errors import NoWorker, SplitserveError
from splitserve.kv.keys import chain_keys, root_key

_log = logging.getLogger(__name__)

Route = Literal["split", "short", "overflow", "local"]

MAX_LOOKUPS = 8
"""Most directories asked for one request. Where there are more, they share one in Redis."""


@dataclass(frozen=True)
class HandOver:
    """A prefill worker, and the lease of its store under which it hands the prompt's KV over."""

    prefill: Worker
    lease: HeldLease
    uncached_tokens: int
    """What the prefill worker is to compute of the prompt."""


class Plan:
    """A request's workers. Counts on them until it is closed, or the prompt is done there.

    Without `hand_over` the decode worker computes the prompt. `route` says why: "short",
    "overflow", or "local" where there was no other way; else it is "split". If the prefill worker
    is lost the lease ends at once: the decode worker then stops to wait for blocks that nobody
    writes any more and computes the rest.
    """

    def __init__(
        self,
        decode: Worker,
        hand_over: HandOver | None = None,
        *,
        local_tokens: int = 0,
        route: Route = "split",
    ) -> None:
        self.decode = decode
        self.model_fingerprint = decode.model_fingerprint
        self.hand_over = hand_over
        self.route = route
        self._on_decode = Claim(decode, local_tokens)
        self._on_prefill: Claim | None = None
        if hand_over is not None:
            self._on_prefill = Claim(hand_over.prefill, hand_over.uncached_tokens)
            hand_over.prefill.on_lost.add(self._release_lease)

    def prefilled(self) -> None:
        """The prefill worker has answered, or never will. Idempotent."""
        if self._on_prefill is not None:
            self._on_prefill.end()

    def joined(self) -> None:
        """The prompt's KV is in the decode worker's pool, or never will be. Idempotent."""
        self._release_lease()
        self._on_decode.computed()

    def close(self) -> None:
        """The request has left. Idempotent."""
        self.prefilled()
        self.joined()
        self._on_decode.end()

    def _release_lease(self) -> None:
        if self.hand_over is not None:
            self.hand_over.prefill.on_lost.discard(self._release_lease)
            self.hand_over.lease.release()


class Planner:
    """Makes plans from what workers report and what the stores' directories know.

    A decode worker computes a prompt itself if

    - fewer than `local_prefill_tokens` of it are not cached there,
    - the prefill tier or the store is out of service, or
    - it would wait too long for the prefill worker, and the decode worker is expected to have it
      done sooner (`overflow`). So an overload of one tier is shared, not passed on.
    """

    def __init__(
        self,
        prefill: WorkerPool,
        decode: WorkerPool,
        stores: Stores,
        policy: Policy,
        *,
        local_prefill_tokens: int,
        overflow: Overflow,
        worker_wait_s: float,
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._stores = stores
        self._policy = policy
        self._local_prefill_tokens = local_prefill_tokens
        self._overflow = overflow
        self._worker_wait_s = worker_wait_s

    async def plan(
        self, request: Request, avoid: Collection[str] = (), *, always_split: bool = False
    ) -> Plan:
        """The way of a new request. Workers at addresses in `avoid` are taken only if need be.

        With `always_split` it goes through the prefill tier whatever the prompt's length and that
        tier's load, if it is in service. Raises NoWorker.
        """
        decoders = await self._decoders(request)
        decoders = _without(decoders, avoid) or decoders
        ready = self._prefill.ready()
        prefillers = _without(ready, avoid) or ready
        if always_split or len(request.prompt) >= self._local_prefill_tokens:
            plan = await self._split(request, prefillers, decoders, always_split=always_split)
            return plan or self._local(decoders, request, "local")
        return self._local(decoders, request, "short")

    async def plan_resume(
        self, request: Request, model_fingerprint: bytes, avoid: Collection[str] = ()
    ) -> Plan:
        """The way of a request whose decode worker was lost. Raises NoWorker.

        Only a worker of the same model can go on from the tokens that the client has: while a
        model is being updated there are others.
        """
        decoders = await self._decoders(
            request, lambda worker: worker.model_fingerprint == model_fingerprint
        )
        return self._local(_without(decoders, avoid) or decoders, request, "local")

    async def _decoders(
        self, request: Request, fits: Callable[[Worker], bool] = lambda worker: True
    ) -> list[Worker]:
        wait_s = min(self._worker_wait_s, request.remaining_s())
        ready = await self._decode.wait_ready(wait_s, fits)
        if not ready:
            raise NoWorker(
                f"no decode worker that fits became ready within {wait_s:.1f} s; retry later"
            )
        return ready

    async def _split(
        self,
        request: Request,
        prefillers: list[Worker],
        decoders: list[Worker],
        *,
        always_split: bool,
    ) -> Plan | None:
        """A way with a hand-over, over another store if one grants no lease; None without any.

        Unless with `always_split`, the local way is planned where that is better.
        """
        length = len(request.prompt)
        while prefillers:
            likely = min(prefillers, key=lambda w: (w.queued_tokens, w.own_requests))
            writers, readers = _same_layout(likely, prefillers), _same_layout(likely, decoders)
            if not readers:
                prefillers = [worker for worker in prefillers if worker not in writers]
                continue
            decode, prefill, lease = await self._choose(request, likely, writers, readers)
            uncached = length - decode.cached_tokens
            route: Route = (
                "split" if always_split else self._route(request, uncached, prefill, decode)
            )
            if route != "split":
                _release(lease)
                return Plan(decode.worker, local_tokens=uncached, route=route)
            writer = prefill.worker
            lease = await self._moved(lease, writer)
            if lease is not None:
                return Plan(decode.worker, HandOver(writer, lease, length - prefill.cached_tokens))
            failed = writer.store_address
            prefillers = [w for w in prefillers if w is not writer and w.store_address != failed]
        return None

    async def _choose(
        self, request: Request, likely: Worker, writers: list[Worker], readers: list[Worker]
    ) -> tuple[Candidate, Candidate, HeldLease | None]:
        """The decode worker, the prefill worker, and a lease of the likely one's store."""
        # The lease is asked for while the directory is: most often it is of the right store.
        granting = asyncio.create_task(self._grant(likely))
        try:
            cached = await self._cached_tokens(request, likely, [*writers, *readers])
            lease = await granting
        except BaseException:
            self._stores.discard(granting)
            raise
        num_tokens = len(request.prompt)
        decode = self._policy.choose_decode(
            [Candidate(w, cached.get(w.id, 0)) for w in readers], num_tokens
        )
        prefill = self._policy.choose_prefill(
            [Candidate(w, _best_prefix(w, cached)) for w in writers], num_tokens
        )
        return decode, prefill, lease

    async def _moved(self, lease: HeldLease | None, prefill: Worker) -> HeldLease | None:
        """A lease of the store that the prefill worker writes to, in place of another's."""
        if lease is not None and lease.store_address == prefill.store_address:
            return lease
        _release(lease)
        return await self._grant(prefill)

    async def _grant(self, worker: Worker) -> HeldLease | None:
        """A lease of the worker's store; None if that store is out of service."""
        address = worker.store_address
        if not address:
            return None
        try:
            return await self._stores.grant(address)
        except SplitserveError as error:
            _log.debug("store %s grants no lease: %s", address, error.message)
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
        addresses = {worker.store_address for worker in workers} - {""}
        blocks = await self._stores.lookup(sorted(addresses)[:MAX_LOOKUPS], keys)
        most = len(request.prompt)
        return {holder: min(n * layout.block_tokens, most) for holder, n in blocks.items()}

    def _route(
        self, request: Request, uncached: int, prefill: Candidate, decode: Candidate
    ) -> Route:
        if uncached < self._local_prefill_tokens:
            return "short"
        # A decode worker computes a prompt anew for each choice that begins before the first is
        # done with it.
        is_one = request.sampling.n == 1
        return "overflow" if is_one and self._overflow.takes(uncached, prefill, decode) else "split"

    def _local(self, decoders: Sequence[Worker], request: Request, route: Route) -> Plan:
        candidates = [Candidate(worker) for worker in decoders]
        decode = self._policy.choose_decode(candidates, len(request.prompt)).worker
        return Plan(decode, local_tokens=len(request.prompt), route=route)


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
    return max(cached.get(worker.id, 0), cached.get(worker.store_address, 0))
