"""WorkerService: what a worker says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from splitserve.engine.core import CoreStats
from splitserve.errors import InvalidRequest, Unavailable
from splitserve.kv.layout import KvLayout
from splitserve.v1 import worker_pb2, worker_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

DEFAULT_INTERVAL_MS = 200
MIN_INTERVAL_MS = 10
MAX_INTERVAL_MS = 60_000


@dataclass(frozen=True)
class Identity:
    """What of a worker's state never changes."""

    worker_id: str
    model: str
    layout: KvLayout
    max_batch: int
    max_step_tokens: int
    max_context_tokens: int


class StateService(worker_pb2_grpc.WorkerServiceServicer):
    """Streams the worker's state to each router, at once when readiness changes."""

    def __init__(
        self,
        identity: Identity,
        stats: Callable[[], CoreStats],
        store_address: Callable[[], str],
    ) -> None:
        """`store_address` tells where the node's store is; empty while it is out of reach."""
        self._identity = identity
        self._stats = stats
        self._store_address = store_address
        self._ready = False
        self._stopping = False
        self._changed = asyncio.Event()

    def set_ready(self, ready: bool) -> None:
        """Readiness has changed: tell everybody."""
        self._ready = ready
        self._tell()

    def stop(self) -> None:
        """End every stream."""
        self._stopping = True
        self._tell()

    async def WatchState(
        self, request: worker_pb2.WatchStateRequest, context: Context
    ) -> AsyncIterator[worker_pb2.WatchStateResponse]:
        """See worker.proto."""
        interval_ms = request.interval_ms or DEFAULT_INTERVAL_MS
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            raise InvalidRequest.single(
                "interval_ms", f"must be 0 or in [{MIN_INTERVAL_MS}, {MAX_INTERVAL_MS}]"
            )
        while not self._stopping:
            changed = self._changed
            yield worker_pb2.WatchStateResponse(state=self.state())
            try:
                async with asyncio.timeout(interval_ms / 1000):
                    await changed.wait()
            except TimeoutError:
                continue
        raise Unavailable("the worker is stopping")

    def state(self) -> worker_pb2.WorkerState:
        """The state now."""
        me, stats = self._identity, self._stats()
        return worker_pb2.WorkerState(
            worker_id=me.worker_id,
            model=me.model,
            kv_layout=me.layout.to_proto(),
            store_address=self._store_address(),
            running=stats.running,
            waiting=stats.waiting,
            queued_tokens=max(0, stats.queued_tokens),
            total_pages=stats.total_pages,
            free_pages=stats.free_pages,
            max_batch=me.max_batch,
            ready=self._ready,
            max_context_tokens=me.max_context_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            max_step_tokens=me.max_step_tokens,
            in_batch=stats.in_batch,
        )

    def _tell(self) -> None:
        """Wake everybody who waits now; who comes later waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
