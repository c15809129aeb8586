"""The decode service: `python -m services.decode --help`. The only wiring."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from itertools import count

from services.decode.config import DecodeConfig
from services.decode.recorder import Recorder
from services.decode.service import DecodeService
from services.decode.session import Bench
from services.decode.submission import Submission
from splitserve.config import run_main
from splitserve.obs.logging import bind_request_id
from splitserve.obs.tracing import use_context
from splitserve.v1 import decode_pb2, decode_pb2_grpc
from splitserve.worker.block_loader import BlockLoader
from splitserve.worker.follower import follow_rank_0
from splitserve.worker.process import Worker, open_worker

SERVICE_NAME: str = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name

LONGEST_LOAD_S = 600.0
"""For a request without a deadline; its lease ends long before, unless its router lives."""


async def serve(config: DecodeConfig) -> None:
    """Run the service until it is told to stop."""
    if config.parallel.rank:
        await follow_rank_0(config)
        return
    async with assembled(config) as (worker, service):
        await worker.run(SERVICE_NAME, service.drain)


@contextlib.asynccontextmanager
async def assembled(config: DecodeConfig) -> AsyncIterator[tuple[Worker, DecodeService]]:
    """A worker that computes and does not listen yet; all of it is closed at the end."""
    async with open_worker("decode", config, prefill=False) as worker:
        bench = Bench(
            core=worker.core,
            relay=worker.relay,
            recorder=Recorder(worker.tracing, worker.metrics, worker.worker_id),
            limits=worker.limits,
            eos_token_ids=worker.engine.spec.eos_token_ids,
            open_loader=lambda submission: _loader(worker, submission),
            serials=count(),
        )
        service = DecodeService(bench, max_pending_tokens=config.max_pending_tokens)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(service, worker.server.grpc)  # type: ignore[no-untyped-call]
        yield worker, service


def _loader(worker: Worker, submission: Submission) -> BlockLoader | None:
    """Where the prompt's KV comes from; None if this worker computes it."""
    if submission.lease is None:
        return None
    with use_context(submission.parent), bind_request_id(submission.request_id):
        return BlockLoader(
            submission.lease,
            open_store=worker.stores.open,
            loaded=worker.core.loaded,
            block_bytes=worker.engine.spec.block_bytes,
            wait_for_writer=True,
            timeout_s=submission.deadline_s or LONGEST_LOAD_S,
            num_loads=len(submission.outputs),
        )


if __name__ == "__main__":
    run_main(DecodeConfig, serve)
