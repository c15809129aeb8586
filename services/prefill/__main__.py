"""The prefill service: `python -m services.prefill --help`. The only wiring."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from services.prefill.config import PrefillConfig
from services.prefill.recorder import Recorder
from services.prefill.service import Bench, PrefillService
from splitserve.config import run_main
from splitserve.v1 import prefill_pb2, prefill_pb2_grpc
from splitserve.worker.follower import follow_rank_0
from splitserve.worker.process import Worker, open_worker

SERVICE_NAME: str = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name


async def serve(config: PrefillConfig) -> None:
    """Run the service until it is told to stop."""
    if config.parallel.rank:
        await follow_rank_0(config)
        return
    async with assembled(config) as (worker, service):
        await worker.run(SERVICE_NAME, service.drain)


@contextlib.asynccontextmanager
async def assembled(config: PrefillConfig) -> AsyncIterator[tuple[Worker, PrefillService]]:
    """A worker that computes and does not listen yet; all of it is closed at the end."""
    async with open_worker("prefill", config, prefill=True) as worker:
        bench = Bench(
            core=worker.core,
            relay=worker.relay,
            recorder=Recorder(worker.tracing, worker.metrics, worker.worker_id),
            spec=worker.engine.spec,
            limits=worker.limits,
            open_store=worker.stores.open,
            load_prefixes=not config.skip_prefix_cache,
        )
        service = PrefillService(bench)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(service, worker.server.grpc)  # type: ignore[no-untyped-call]
        yield worker, service


if __name__ == "__main__":
    run_main(PrefillConfig, serve)
