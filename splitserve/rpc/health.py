"""The standard health service.

grpcio-health-checking has one for asyncio, but its `Watch` forgets all watchers of a name when
one of them leaves, and several routers watch one worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.rpc.types import Context

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

LIVENESS = "liveness"
READINESS = "readiness"


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers for the names it was given. Used from one event loop."""

    def __init__(self) -> None:
        self._status: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set(self, names: Iterable[str], serving: bool) -> None:
        """Sets the names' status and tells whoever watches."""
        self._status.update(dict.fromkeys(names, SERVING if serving else NOT_SERVING))
        # Watchers hold on to the event they wait for; the next change gets a new one.
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The status now."""
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of this name")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and after each change of it."""
        last: int | None = None
        while True:
            changed = self._changed
            status = self._status.get(request.service, UNKNOWN)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await changed.wait()
