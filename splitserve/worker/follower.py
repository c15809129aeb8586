"""A worker process that is not rank 0: it follows rank 0, and serves nothing but its own health.

One process a node follows in this way, and starts the other ranks of its node; started by
torchrun, each rank does, and the first of its node serves the health.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Callable

import grpc
from grpc_health.v1 import health_pb2_grpc

from splitserve.errors import ConfigError
from splitserve.obs.http import ObsServer
from splitserve.obs.metrics import Metrics
from splitserve.parallel.rendezvous import ParallelConfig
from splitserve.rpc.health import LIVENESS, READINESS, HealthService
from splitserve.worker.config import WorkerConfig


async def follow_rank_0(config: WorkerConfig) -> None:
    """Returns once rank 0 has said stop.

    Raises `ConfigError` or `CheckpointError` for what this rank cannot open.
    """
    loop, parallel = asyncio.get_running_loop(), config.parallel

    def on_stop(act: Callable[[], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.call_soon_threadsafe(loop.add_signal_handler, number, act)

    async with contextlib.AsyncExitStack() as stack:
        set_ready = _nobody_asks
        if parallel.local_rank == 0:
            set_ready = await stack.enter_async_context(_health(config))

        def opened() -> None:
            loop.call_soon_threadsafe(set_ready)

        ended: asyncio.Future[None] = loop.create_future()
        # One thread opens and computes; it is left behind if this process is stopped before.
        following = threading.Thread(
            target=_follow, args=(parallel, on_stop, opened, loop, ended), daemon=True
        )
        following.start()
        await ended


@contextlib.asynccontextmanager
async def _health(config: WorkerConfig) -> AsyncIterator[Callable[[], None]]:
    """Live from now on; ready once what is yielded has been called."""
    health, ready = HealthService(), threading.Event()
    health.set([LIVENESS], serving=True)
    health.set([READINESS, ""], serving=False)

    def set_ready() -> None:
        health.set([READINESS, ""], serving=True)
        ready.set()

    metrics = Metrics(model_name=config.served_name)
    obs = ObsServer(config.host, config.metrics_port, metrics.registry, ready=ready.is_set)
    probes = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, probes)
    try:
        if config.health_port:
            _bind(probes, config)
            await probes.start()
        yield set_ready
    finally:
        await probes.stop(0)
        obs.stop()


def _bind(probes: grpc.aio.Server, config: WorkerConfig) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.health_port}"
    try:
        probes.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"health_port: cannot listen on {address}; is it taken? set --health-port"
        ) from error


def _nobody_asks() -> None:
    """Another rank of the node answers."""


def _follow(
    parallel: ParallelConfig,
    on_stop: Callable[[Callable[[], None]], None],
    opened: Callable[[], None],
    loop: asyncio.AbstractEventLoop,
    ended: asyncio.Future[None],
) -> None:
    from splitserve.parallel.children import LocalRanks
    from splitserve.parallel.ending import Ending
    from splitserve.parallel.follow import follow
    from splitserve.parallel.opening import open_rank

    try:
        ending = Ending()
        others = LocalRanks(parallel, "", ending) if parallel.starts_ranks else None
        follow(parallel, open_rank, ending, is_child=False, on_stop=on_stop, opened=opened)
        if others:
            others.stop()
    except BaseException as error:
        loop.call_soon_threadsafe(ended.set_exception, error)
    else:
        loop.call_soon_threadsafe(ended.set_result, None)
