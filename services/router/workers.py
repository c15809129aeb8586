"""The live workers of a tier, by what each says of itself.

Each address is watched over a channel of its own: `WatchState` stays open as long as the worker
lives, and its end is how a lost worker is noticed. An address that leaves discovery gets no new
requests, but its channel stays until the worker itself ends the stream, so that a draining
worker can finish what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import grpc

from services.router.discovery import Targets
from splitserve.v1 import worker_pb2, worker_pb2_grpc

_log = logging.getLogger(__name__)

REPORT_INTERVAL_MS = 200
STALE_AFTER_S = 2.0
RECONNECT_FIRST_S = 0.05
RECONNECT_MAX_S = 0.5

OpenChannel = Callable[[str], grpc.aio.Channel]


class Worker:
    """One worker and what this router has given it.

    `own_requests` and `own_tokens` count this router's requests that the worker has now, and prompt
    tokens that it is to compute. They are exact and immediate where the worker's report is of a
    moment ago. `told_rate` is which run of the process last said how fast it computes prompts and
    what, and `rate_told_s` when it first said so. What is in `on_lost` is called when this run of
    the worker's process is gone; it must not wait.
    """

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.state: worker_pb2.WorkerState | None = None
        self.heard_s = 0.0
        self.rate_told_s = 0.0
        self.told_rate = ("", 0.0)
        self.own_requests = 0
        self.own_tokens = 0
        self.on_lost: set[Callable[[], None]] = set()

    @property
    def id(self) -> str:
        """The name of this run of the worker's process; empty before its first report."""
        return self.state.worker_id if self.state is not None else ""

    @property
    def model_fingerprint(self) -> bytes:
        """What its KV and its tokens depend on; empty before its first report."""
        return self.state.kv_layout.model_fingerprint if self.state is not None else b""

    @property
    def store_address(self) -> str:
        """The KV store that it uses; empty if none, and before its first report."""
        return self.state.store_address if self.state is not None else ""

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait there, as reported or as given, whichever is more."""
        reported = self.state.queued_tokens if self.state is not None else 0
        return max(reported, self.own_tokens)

    @property
    def prefill_tokens_per_s(self) -> float:
        """How fast it computed its last prompts; 0 where it does not say."""
        return self.state.prefill_tokens_per_s if self.state is not None else 0.0

    @property
    def num_requests(self) -> int:
        """Requests that run or wait there, as reported or as given, whichever is more."""
        reported = self.state.running + self.state.waiting if self.state is not None else 0
        return max(reported, self.own_requests)


class Claim:
    """One request on a worker, and the prompt tokens that this one is to compute for it."""

    def __init__(self, worker: Worker, num_tokens: int) -> None:
        self._worker = worker
        self._num_requests = 1
        self._num_tokens = num_tokens
        worker.own_requests += 1
        worker.own_tokens += num_tokens

    def computed(self) -> None:
        """The tokens are done. Idempotent."""
        self._worker.own_tokens -= self._num_tokens
        self._num_tokens = 0

    def end(self) -> None:
        """The worker has nothing of the request any more. Idempotent."""
        self.computed()
        self._worker.own_requests -= self._num_requests
        self._num_requests = 0


class WorkerPool:
    """Watches every worker behind `targets`. `model` is the only one that is taken in."""

    def __init__(
        self,
        tier: str,
        targets: Targets,
        open_channel: OpenChannel,
        model: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self._targets = targets
        self._open_channel = open_channel
        self._model = model
        self._clock = clock
        self._wanted: frozenset[str] = frozenset()
        self._workers: dict[str, Worker] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._discovery: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Begin to watch. Returns after the first answer of discovery, with no worker needed."""
        await self._refresh()
        if self._targets.refresh_s is not None:
            self._discovery = asyncio.create_task(self._rediscover(self._targets.refresh_s))

    async def close(self) -> None:
        """Stop watching and close every channel."""
        tasks = [*self._watchers.values()]
        if self._discovery is not None:
            tasks.append(self._discovery)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def ready(self) -> list[Worker]:
        """Workers that take new requests now."""
        now = self._clock()
        return [worker for worker in self._workers.values() if self._takes_requests(worker, now)]

    def known(self) -> list[Worker]:
        """Workers that have reported and are not lost, ready or not."""
        return [worker for worker in self._workers.values() if worker.state is not None]

    @property
    def num_watched(self) -> int:
        """Addresses that are being watched."""
        return len(self._watchers)

    async def wait_ready(
        self, timeout_s: float, fits: Callable[[Worker], bool] = lambda worker: True
    ) -> list[Worker]:
        """Ready workers that fit, as soon as there is one; an empty list after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not any(map(fits, self.ready())):
                    self._changed.clear()
                    await self._changed.wait()
        return [worker for worker in self.ready() if fits(worker)]

    def _takes_requests(self, worker: Worker, now: float) -> bool:
        return (
            worker.state is not None
            and worker.state.ready
            and worker.address in self._wanted
            and now - worker.heard_s < STALE_AFTER_S
        )

    async def _rediscover(self, refresh_s: float) -> None:
        while True:
            await asyncio.sleep(refresh_s)
            await self._refresh()

    async def _refresh(self) -> None:
        self._wanted = await self._targets.resolve()
        for address in self._wanted - self._watchers.keys():
            self._watchers[address] = asyncio.create_task(
                self._watch(address), name=f"watch-{address}"
            )
        for address in self._watchers.keys() - self._wanted:
            if address not in self._workers or self._workers[address].state is None:
                self._watchers[address].cancel()

    async def _watch(self, address: str) -> None:
        """Follow one address until it has left discovery and its worker is gone."""
        worker = Worker(address, self._open_channel(address))
        self._workers[address] = worker
        delay_s = RECONNECT_FIRST_S
        try:
            while True:
                if await self._follow(worker):
                    delay_s = RECONNECT_FIRST_S
                if address not in self._wanted:
                    return
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_MAX_S)
        finally:
            del self._workers[address], self._watchers[address]
            await worker.channel.close(None)

    async def _follow(self, worker: Worker) -> bool:
        """Take in reports until the stream ends. Returns whether there was one."""
        stub = worker_pb2_grpc.WorkerServiceStub(worker.channel)  # type: ignore[no-untyped-call]
        request = worker_pb2.WatchStateRequest(interval_ms=REPORT_INTERVAL_MS)
        call = stub.WatchState(request)
        heard = False
        try:
            async for report in call:
                heard |= self._take(worker, report.state)
        except grpc.aio.AioRpcError as error:
            if heard:
                _log.warning(
                    "%s worker %s at %s is lost: %s",
                    *(self.tier, worker.id, worker.address, error.details()),
                )
        finally:
            call.cancel()
            worker.state = None
            for tell in list(worker.on_lost):
                tell()
            self._changed.set()
        return heard

    def _take(self, worker: Worker, state: worker_pb2.WorkerState) -> bool:
        if self._model and state.model and not _same_model(state.model, self._model):
            if worker.heard_s == 0.0:
                _log.error(
                    "%s worker at %s serves %r, not %r; it gets no requests",
                    *(self.tier, worker.address, state.model, self._model),
                )
            worker.heard_s = self._clock()
            return False
        if worker.id != state.worker_id:
            _log.info("%s worker %s at %s", self.tier, state.worker_id, worker.address)
        worker.heard_s = self._clock()
        rate = (state.worker_id, state.prefill_tokens_per_s)
        if worker.told_rate != rate:
            worker.told_rate, worker.rate_told_s = rate, worker.heard_s
        worker.state = state
        self._changed.set()
        return True


def _same_model(one: str, other: str) -> bool:
    """Whether two names are of one model; a file may be named with its ending or without."""
    return one.removesuffix(".gguf") == other.removesuffix(".gguf")
