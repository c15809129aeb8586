"""The KV store service: `python -m services.kvstore --help`.

1. The arena is made, its handle socket bound, and the port opened; then the service is ready.
2. The sweeper ends leases that nobody renews, and with them what they held.
3. On SIGTERM it is not ready any more, lets open calls end within the grace, and exits. Nothing is
   kept: the arena goes with the process, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.kvstore.arena import Arena
from services.kvstore.config import KvStoreConfig
from services.kvstore.directory import Directory, MemoryDirectory
from services.kvstore.handles import HandleServer, abstract_name
from services.kvstore.redis_directory import RedisDirectory
from services.kvstore.service import Advertised, KvStoreService
from services.kvstore.store import Store, StoreLimits
from services.kvstore.sweeper import Sweeper
from splitserve.config import run_main
from splitserve.obs.http import ObsServer
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing, setup_tracing
from splitserve.rpc.lifecycle import run_until_signal
from splitserve.rpc.server import RpcServer
from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

SERVICE_NAME = kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"].full_name

_log = logging.getLogger("services.kvstore")


@dataclass(frozen=True)
class KvStore:
    """A store that takes calls, and its parts for those who look into it."""

    server: RpcServer
    metrics: Metrics
    store: Store
    service: KvStoreService
    sweeping: asyncio.Task[None]


async def serve(config: KvStoreConfig) -> None:
    """Runs the service until it is told to stop."""
    tracing = setup_tracing("kvstore", config.otlp_endpoint)
    serving = threading.Event()  # asked from the probes' thread
    try:
        async with started(config, tracing) as kvstore:
            registry, server = kvstore.metrics.registry, kvstore.server
            obs = ObsServer(config.host, config.metrics_port, registry, ready=serving.is_set)

            async def drain() -> None:
                serving.clear()
                kvstore.service.drain()
                await server.drain(config.drain_grace_s)

            try:
                serving.set()
                await run_until_signal(drain, server.stop, failed=kvstore.sweeping)
            finally:
                obs.stop()
    finally:
        tracing.shutdown()


@contextlib.asynccontextmanager
async def started(config: KvStoreConfig, tracing: Tracing) -> AsyncIterator[KvStore]:
    """A store that is ready; stopped at the end, with everything that it started."""
    metrics = Metrics()
    server = RpcServer(
        "kvstore",
        config.bind,
        tls=config.tls,
        insecure=config.insecure,
        health_port=config.health_port,
        max_connection_age_s=config.max_connection_age_s,
        tracing=tracing,
        metrics=metrics,
    )

    def address() -> str:
        return config.advertise_address or f"{config.bind.rpartition(':')[0]}:{server.port}"

    memory = MemoryDirectory(max_entries=config.max_directory_entries)
    redis = RedisDirectory(config.redis_url, memory, own_id=address) if config.redis_url else None
    directory: Directory = redis or memory
    arena = Arena(config.arena_bytes)
    limits = StoreLimits(
        max_leases=config.max_leases,
        max_lease_ttl_ms=config.max_lease_ttl_ms,
        max_awaiting_calls=config.max_awaiting_calls,
        max_awaited_keys=config.max_awaited_keys,
    )
    store = Store(arena, limits=limits, watcher=redis)
    socket_name = (config.handle_socket or abstract_name()) if config.shared_memory else ""
    service = KvStoreService(store, directory, Advertised(address, socket_name))
    kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(service, server.grpc)  # type: ignore[no-untyped-call]

    async with contextlib.AsyncExitStack() as stack:
        stack.callback(arena.close)
        if socket_name:
            handles = HandleServer(
                socket_name, fd=arena.fd, epoch=store.epoch, arena_bytes=arena.size_bytes
            )
            handles.start()
            stack.callback(handles.stop)
        await server.start([SERVICE_NAME])
        stack.push_async_callback(server.stop)
        await directory.start()
        stack.push_async_callback(directory.stop)
        sweeping = asyncio.create_task(Sweeper(store, metrics).run(), name="sweeper")
        stack.callback(sweeping.cancel)
        server.set_ready(True)
        _log.info("listening on %s, epoch %d", address(), store.epoch)
        yield KvStore(server, metrics, store, service, sweeping)


if __name__ == "__main__":
    run_main(KvStoreConfig, serve)
