"""A worker process around one engine: what prefill and decode have in common.

1. The engine is opened; a checkpoint that cannot be loaded ends the process with one line.
2. The port is bound and announced on stdout; the worker is live, not ready.
3. The canary runs through the core; when it has, routers see the worker as ready.
4. On SIGTERM it is not ready any more; requests that it has may end within the grace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from splitserve.engine.core import CoreStats, EngineCore
from splitserve.engine.factory import open_engine
from splitserve.engine.protocol import Engine
from splitserve.errors import ConfigError
from splitserve.kv.client import KvStoreClient
from splitserve.kv.layout import KvLayout
from splitserve.obs.http import ObsServer
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing, setup_tracing
from splitserve.rpc.lifecycle import run_until_signal
from splitserve.rpc.server import RpcServer
from splitserve.sampling import SamplingLimits
from splitserve.v1 import worker_pb2, worker_pb2_grpc
from splitserve.worker.config import WorkerConfig
from splitserve.worker.pages import EnginePages
from splitserve.worker.readiness import Readiness
from splitserve.worker.relay import OutputRelay
from splitserve.worker.state import Identity, StateService
from splitserve.worker.stores import Stores

WORKER_SERVICE: str = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
CORE_STOP_S = 5.0
LAST_CALLS_S = 1.0
MAX_CHOICES = 64


@dataclass(frozen=True)
class Worker:
    """The parts that a tier's own service is built from."""

    config: WorkerConfig
    worker_id: str
    engine: Engine
    core: EngineCore
    relay: OutputRelay
    stores: Stores
    server: RpcServer
    state: StateService
    readiness: Readiness
    tracing: Tracing
    metrics: Metrics

    @property
    def limits(self) -> SamplingLimits:
        """What the engine can take; the caps of the service are the router's."""
        spec = self.engine.spec
        return SamplingLimits(
            vocab_size=spec.vocab_size,
            max_context_tokens=spec.max_context_tokens,
            max_tokens=spec.max_context_tokens,
            max_choices=MAX_CHOICES,
        )

    async def run(self, service_name: str, drain: Callable[[], Awaitable[None]]) -> None:
        """Serve until a signal; `drain` returns once the tier's requests have ended."""
        async with self.listening(service_name) as watch:
            obs = ObsServer(
                self.config.host,
                self.config.metrics_port,
                self.metrics.registry,
                ready=lambda: self.readiness.ready,
            )
            ports = {"port": self.server.port, "metrics_port": obs.port}
            try:
                print(json.dumps({"event": "ready", **ports}), flush=True)
                await run_until_signal(lambda: self._drain(drain), self.server.stop, failed=watch)
            finally:
                obs.stop()

    @contextlib.asynccontextmanager
    async def listening(self, service_name: str) -> AsyncIterator[asyncio.Task[None]]:
        """Take calls, and be ready once the canary has passed. Yields what watches over that,
        which ends only if it fails.
        """
        await self.server.start([service_name, WORKER_SERVICE])
        try:
            yield self.readiness.start()
        finally:
            await self.server.stop()

    async def _drain(self, drain: Callable[[], Awaitable[None]]) -> None:
        """Routers keep hearing the state until the last request has ended."""
        self.readiness.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.drain_grace_s):
                await drain()
        self.state.stop()
        await self.server.drain(LAST_CALLS_S)


@contextlib.asynccontextmanager
async def open_worker(tier: str, config: WorkerConfig, *, prefill: bool) -> AsyncIterator[Worker]:
    """Open the engine and everything around it; close it all at the end.

    Raises:
        ConfigError: a setting is wrong.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if config.nice:
        os.nice(config.nice)
    engine = open_engine(config.engine_config, config.parallel)
    worker_id = config.worker_id or f"{tier}-{uuid.uuid4().hex[:12]}"
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, engine.close)
        tracing = setup_tracing(tier, config.otlp_endpoint, instance_id=worker_id)
        stack.callback(tracing.shutdown)
        worker = _assemble(tier, config, engine, worker_id, tracing, prefill)
        worker.stores.start()
        stack.push_async_callback(worker.stores.close)
        worker.core.start()
        stack.push_async_callback(asyncio.to_thread, _stop_core, worker.core)
        stack.push_async_callback(worker.readiness.stop)
        yield worker


def _assemble(
    tier: str,
    config: WorkerConfig,
    engine: Engine,
    worker_id: str,
    tracing: Tracing,
    prefill: bool,
) -> Worker:
    loop = asyncio.get_running_loop()
    spec = engine.spec
    layout = KvLayout(spec.fingerprint, spec.block_tokens, spec.block_bytes)
    metrics = Metrics(model_name=config.served_name)
    pages = EnginePages(engine)
    if config.transport == "device" and pages.shared is None:
        raise ConfigError(
            "SPLITSERVE_TRANSPORT (--transport): device needs an engine whose pages others can "
            "map: one GPU without --deterministic"
        )
    relay = OutputRelay(loop)
    stores = Stores(config.kvstore, _connector(config, worker_id, layout, metrics, pages, prefill))

    def publish(added: list[bytes], removed: list[bytes]) -> None:
        loop.call_soon_threadsafe(stores.publish, added, removed)

    core = EngineCore(engine, config.core_config, relay, publish)
    server = RpcServer(
        tier,
        config.bind,
        tls=config.tls,
        insecure=config.insecure,
        health_port=config.health_port,
        max_connection_age_s=config.max_connection_age_s,
        tracing=tracing,
        metrics=metrics,
    )
    identity = Identity(
        worker_id=worker_id,
        model=config.served_name,
        layout=layout,
        max_batch=config.max_batch,
        max_step_tokens=config.step_tokens,
        max_context_tokens=spec.max_context_tokens,
    )
    state = StateService(identity, core.stats, lambda: stores.home_address)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(state, server.grpc)  # type: ignore[no-untyped-call]

    def on_ready(ready: bool) -> None:
        server.set_ready(ready)
        state.set_ready(ready)

    readiness = Readiness(
        core,
        relay,
        prefill=prefill,
        stuck_after_s=config.stuck_after_s,
        on_ready=on_ready,
        on_stats=_LoadMetrics(metrics),
    )
    return Worker(
        config=config,
        worker_id=worker_id,
        engine=engine,
        core=core,
        relay=relay,
        stores=stores,
        server=server,
        state=state,
        readiness=readiness,
        tracing=tracing,
        metrics=metrics,
    )


def _connector(
    config: WorkerConfig,
    worker_id: str,
    layout: KvLayout,
    metrics: Metrics,
    pages: EnginePages,
    keeps_blocks: bool,
) -> Callable[[str], Awaitable[KvStoreClient]]:
    async def connect(address: str) -> KvStoreClient:
        # Only the node's own store hears what the pool has, under the worker's own name.
        own_name = worker_id if address == config.kvstore else f"{worker_id}@{config.kvstore}"
        return await KvStoreClient.connect(
            address,
            worker_id=own_name,
            layout=layout,
            tls=config.tls,
            transport=config.transport,
            metrics=metrics,
            pages=pages,
            keeps_blocks=keeps_blocks,
        )

    return connect


def _stop_core(core: EngineCore) -> None:
    """Stop the loop; one that hangs in a step is left behind."""
    stopping = threading.Thread(target=core.stop, daemon=True)
    stopping.start()
    stopping.join(CORE_STOP_S)


class _LoadMetrics:
    """Copies the core's counts into the gauges."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._preemptions = 0

    def __call__(self, stats: CoreStats) -> None:
        self._metrics.num_requests_running.set(stats.running)
        self._metrics.num_requests_waiting.set(stats.waiting)
        held = stats.total_pages - stats.free_pages
        self._metrics.kv_cache_usage_perc.set(held / max(1, stats.total_pages))
        self._metrics.num_preemptions.inc(stats.num_preemptions - self._preemptions)
        self._preemptions = stats.num_preemptions
