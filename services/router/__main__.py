"""The router service: `python -m services.router --help`.

1. The tokenizer is loaded, workers are looked for, and the port is opened.
2. A short generation through both tiers succeeds: the router is ready. Where only the decode
   tier is in service it waits `--split-wait-s` for the other, and then serves without it.
3. Each request takes the way told in `generation` and `dispatch`.
4. On SIGTERM it is not ready any more, lets open streams finish within the grace, and exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.router.admission import Admission
from services.router.auth import ApiKeys, OpenAccess
from services.router.canary import Canary
from services.router.config import ANY_MODEL, RouterConfig
from services.router.decode_client import DecodeLinks
from services.router.discovery import NO_WORKERS, parse_targets
from services.router.dispatch import Dispatcher
from services.router.generation import Generation
from services.router.intake import Intake
from services.router.loading import LoadedModel, load_model
from services.router.model import ModelCaps, ServedModel
from services.router.overflow import Overflow
from services.router.planner import Planner
from services.router.policy import make_policy
from services.router.pruning import prune_forever
from services.router.readiness import Readiness
from services.router.service import InferenceService
from services.router.stores import Stores
from services.router.workers import WorkerPool
from splitserve.config import run_main
from splitserve.obs.http import ObsServer
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing, setup_tracing
from splitserve.rpc.channel import open_channel
from splitserve.rpc.lifecycle import run_until_signal
from splitserve.rpc.options import TO_CLIENTS
from splitserve.rpc.server import RpcServer
from splitserve.v1 import inference_pb2, inference_pb2_grpc

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_log = logging.getLogger("services.router")


@dataclass(frozen=True)
class Router:
    """A router that takes requests, and its parts for those who look into it."""

    server: RpcServer
    metrics: Metrics
    readiness: Readiness
    admission: Admission
    generation: Generation
    links: DecodeLinks
    stores: Stores
    pools: tuple[WorkerPool, WorkerPool]


async def serve(config: RouterConfig) -> None:
    """Runs the service until it is told to stop."""
    tracing = setup_tracing("router", config.otlp_endpoint)
    try:
        async with started(config, tracing) as router:
            obs = ObsServer(
                config.host,
                config.metrics_port,
                router.metrics.registry,
                ready=lambda: router.readiness.ready,
            )
            ports = {"port": router.server.port, "metrics_port": obs.port}
            print(json.dumps({"event": "ready", **ports}), flush=True)
            try:
                await run_until_signal(lambda: _drain(router, config), router.server.stop)
            finally:
                obs.stop()
    finally:
        tracing.shutdown()


@contextlib.asynccontextmanager
async def started(config: RouterConfig, tracing: Tracing) -> AsyncIterator[Router]:
    """A router that listens; stopped at the end, with everything that it started."""
    metrics = Metrics(model_name=config.served_name)
    server = RpcServer(
        "router",
        config.bind,
        tls=config.tls,
        insecure=config.insecure,
        max_message_bytes=config.max_message_bytes,
        health_port=config.health_port,
        max_connection_age_s=config.max_connection_age_s,
        keepalive=TO_CLIENTS,
        tracing=tracing,
        metrics=metrics,
    )
    async with contextlib.AsyncExitStack() as stack:
        loaded = load_model(config)
        stack.callback(loaded.encoder.close)
        if loaded.chat is not None:
            stack.push_async_callback(loaded.chat.close)
            await loaded.chat.start()
        pools = (
            _pool(config, "prefill", config.prefill, tracing),
            _pool(config, "decode", config.decode, tracing),
        )
        stores, links = _stores(config), DecodeLinks()
        for closing in (*pools, stores, links):
            stack.push_async_callback(closing.close)
        router = _assemble(config, tracing, metrics, server, loaded, pools, stores, links)
        for pool in pools:
            await pool.start()
        port = await server.start([SERVICE_NAME])
        stack.push_async_callback(server.stop)
        watching = asyncio.create_task(router.readiness.run(), name="readiness")
        stack.push_async_callback(_end, watching)
        pruning = asyncio.create_task(prune_forever(pools, links, stores), name="pruning")
        stack.push_async_callback(_end, pruning)
        _log.info("listening on %s:%d, serving %s", config.host, port, config.served_name)
        yield router


def _assemble(
    config: RouterConfig,
    tracing: Tracing,
    metrics: Metrics,
    server: RpcServer,
    loaded: LoadedModel,
    pools: tuple[WorkerPool, WorkerPool],
    stores: Stores,
    links: DecodeLinks,
) -> Router:
    planner = Planner(
        *pools,
        stores,
        make_policy(config.policy),
        local_prefill_tokens=config.local_prefill_tokens,
        overflow=Overflow(config.max_prefill_wait_ms / 1000),
        worker_wait_s=config.worker_wait_s,
    )
    dispatcher = Dispatcher(planner, links, tracing, metrics, max_attempts=config.max_attempts)
    caps = ModelCaps(
        vocab_size=loaded.vocab_size,
        max_context_tokens=loaded.max_context_tokens,
        max_tokens=config.max_tokens_cap,
        default_max_tokens=config.default_max_tokens,
        max_choices=config.max_choices,
    )
    model = ServedModel(config.served_name, caps, pools)
    intake = Intake(model, loaded.encoder, share_cache=config.share_cache_between_tenants)
    admission = Admission(config.max_running, config.max_waiting, config.max_queued_tokens)
    generation = Generation(
        intake,
        loaded.encoder,
        admission,
        dispatcher,
        metrics,
        tracing,
        model.name,
        max_pending_bytes=config.max_pending_bytes,
    )
    readiness = Readiness(
        Canary(intake, dispatcher),
        server.set_ready,
        metrics.router_split_working.set,
        interval_s=config.canary_interval_s,
        timeout_s=config.canary_timeout_s,
        split_wait_s=0.0 if config.prefill == NO_WORKERS else config.split_wait_s,
    )
    service = InferenceService(
        generation,
        model,
        loaded.encoder,
        ApiKeys.from_file(config.api_keys_file) if config.api_keys_file else OpenAccess(),
        metrics,
        ready=lambda: readiness.ready,
        default_deadline_s=config.default_deadline_s,
        max_deadline_s=config.max_deadline_s,
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server.grpc)  # type: ignore[no-untyped-call]
    return Router(server, metrics, readiness, admission, generation, links, stores, pools)


async def _drain(router: Router, config: RouterConfig) -> None:
    router.readiness.stop()
    await router.server.drain(config.drain_grace_s)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _stores(config: RouterConfig) -> Stores:
    return Stores(
        f"router@{socket.gethostname()}"[:200],
        ttl_ms=config.lease_ttl_ms,
        rpc_timeout_s=config.store_timeout_s,
        tls=config.tls,
    )


def _pool(config: RouterConfig, tier: str, targets: str, tracing: Tracing) -> WorkerPool:
    return WorkerPool(
        tier,
        parse_targets(targets, variable=tier, refresh_s=config.dns_refresh_s),
        lambda address: open_channel(address, tls=config.tls, tracing=tracing),
        "" if config.served_name == ANY_MODEL else config.served_name,
    )


if __name__ == "__main__":
    run_main(RouterConfig, serve)
