"""The call that has a prompt computed on a prefill worker."""

from __future__ import annotations

import grpc

from services.router.request import Request
from services.router.workers import Worker
from splitserve.rpc.status import error_from_rpc
from splitserve.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc


async def prefill(
    worker: Worker,
    request: Request,
    request_id: str,
    lease: common_pb2.LeaseRef,
    timeout_s: float,
) -> prefill_pb2.PrefillResponse:
    """Compute the prompt there and return the first tokens. Cancelling cancels it there.

    Raises the error that the worker's status stands for; a worker that is gone is Unavailable.
    """
    stub = prefill_pb2_grpc.PrefillServiceStub(worker.channel)  # type: ignore[no-untyped-call]
    message = prefill_pb2.PrefillRequest(
        request_id=request_id,
        prompt_token_ids=request.prompt,
        sampling=request.wire_sampling,
        cache_salt=request.cache_salt,
        lease=lease,
    )
    call = stub.Prefill(message, timeout=timeout_s)
    try:
        response: prefill_pb2.PrefillResponse = await call
        return response
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    finally:
        call.cancel()
