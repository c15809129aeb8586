"""A gRPC server as every service of the suite runs it."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from splitserve.errors import ConfigError
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing
from splitserve.rpc.health import LIVENESS, READINESS, HealthService
from splitserve.rpc.options import (
    BETWEEN_TIERS,
    DEFAULT_MAX_MESSAGE_BYTES,
    Keepalive,
    server_options,
)
from splitserve.rpc.server_interceptor import CallInterceptor
from splitserve.rpc.tls import TlsConfig, check_bind, split_address
from splitserve.rpc.types import ServerInterceptor

HEALTH_SERVICE: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class RpcServer:
    """One listening port with health, reflection, keepalive and the suite's interceptors.

    Made and used inside one running event loop: add servicers to `grpc`, `start`, and `drain`.
    """

    def __init__(
        self,
        name: str,
        bind: str,
        *,
        tls: TlsConfig | None = None,
        insecure: bool = False,
        health_port: int = 0,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_connection_age_s: float | None = None,
        keepalive: Keepalive = BETWEEN_TIERS,
        interceptors: Sequence[ServerInterceptor] = (),
        tracing: Tracing | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Prepares `name` to listen on `bind`, "host:port"; port 0 takes a free one.

        `interceptors` run inside the suite's own, so what they raise becomes a proper status.
        `health_port`, if not 0, serves health alone, in plaintext even where `tls` is set: the
        kubelet, which asks there, has no certificate.
        Without `tracing` the process's is used. Raises ConfigError for a bind without TLS that
        other machines could reach.
        """
        self.name = name
        self._host, self._port = split_address(bind)
        self._tls = tls
        check_bind(self._host, tls, insecure)
        self._health = HealthService()
        self._health_port = health_port
        self._probes: grpc.aio.Server | None = grpc.aio.server() if health_port else None
        self._ready_names: list[str] = []
        self._draining = False
        self.grpc: grpc.aio.Server = grpc.aio.server(
            options=server_options(max_message_bytes, max_connection_age_s, keepalive),
            interceptors=[CallInterceptor(tracing or Tracing.of_process(), metrics), *interceptors],
        )

    @property
    def port(self) -> int:
        """The port that is bound."""
        return self._port

    async def start(self, service_names: Sequence[str]) -> int:
        """Binds and serves; not ready until `set_ready(True)`. Returns the port.

        `service_names` are full names such as `splitserve.v1.KvStoreService`. Raises ConfigError
        if the port is taken or the certificates do not load.
        """
        self._ready_names = [READINESS, "", *service_names]
        self._health.set([LIVENESS], serving=True)
        self._health.set(self._ready_names, serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*service_names, HEALTH_SERVICE, reflection.SERVICE_NAME), self.grpc
        )
        self._port = self._bind(self.grpc, self._port, self._tls)
        await self.grpc.start()
        if self._probes is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
            self._bind(self._probes, self._health_port, None)
            await self._probes.start()
        return self._port

    def set_ready(self, ready: bool) -> None:
        """Sets "readiness", "" and every service; stays off once draining has begun."""
        self._health.set(self._ready_names, serving=ready and not self._draining)

    async def drain(self, grace_s: float) -> None:
        """Not ready from now on; takes no new calls, lets open ones end, cancels them after
        `grace_s`, and stops.
        """
        self.set_ready(False)
        self._draining = True
        await self.grpc.stop(grace_s)
        if self._probes is not None:  # to the end, so that a draining pod can be told from a dead
            await self._probes.stop(0)

    async def stop(self) -> None:
        """Stops at once; open calls are cancelled."""
        await self.drain(0)

    def _bind(self, server: grpc.aio.Server, port: int, tls: TlsConfig | None) -> int:
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{port}"
        try:
            if tls is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, tls.server_credentials())
        except RuntimeError as error:
            raise ConfigError(
                f"port: {self.name} cannot listen on {address}; is it taken? set --port"
            ) from error
