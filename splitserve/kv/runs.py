"""Which run of a store a client is connected to, and how that run's bytes are reached."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Literal

from splitserve.errors import LeaseEnded, Unavailable
from splitserve.kv.control import StoreControl, typed_errors
from splitserve.kv.copier import Copier
from splitserve.kv.layout import KvLayout, Lease
from splitserve.kv.pages import PageAccess
from splitserve.kv.transports.base import Transport
from splitserve.kv.transports.grpc import GrpcTransport
from splitserve.kv.transports.shm import ShmTransport
from splitserve.v1 import kvstore_pb2

_log = logging.getLogger(__name__)

TransportChoice = Literal["auto", "device", "shm", "grpc"]
"""How bytes may travel. `auto` and `device` let blocks stay in pools and take shared memory for the
rest where it can be reached, else gRPC; `shm` and `grpc` take nothing else.
"""


@dataclass(frozen=True)
class StoreRun:
    """One run of a store's process."""

    epoch: int
    transport: Transport
    advertised_address: str


class StoreRuns:
    """Introduces a worker to a store, and again after the store has restarted.

    A lease tells by its epoch which run granted it. One of a later run than the present means that
    the store has restarted; one of an earlier run has ended.
    """

    def __init__(
        self,
        control: StoreControl,
        copier: Copier,
        *,
        worker_id: str,
        layout: KvLayout,
        choice: TransportChoice,
        rpc_timeout_s: float,
        pages: PageAccess | None = None,
    ) -> None:
        self._control = control
        self._copier = copier
        self._introduction = kvstore_pb2.ConnectRequest(
            worker_id=worker_id, kv_layout=layout.to_proto()
        )
        self._choice = choice
        self._pages = pages
        self._timeout_s = rpc_timeout_s
        self._present: StoreRun | None = None
        self._lost = False
        self._connecting = asyncio.Lock()

    @property
    def present(self) -> StoreRun:
        """The run last connected to. Raises Unavailable before the first."""
        if self._present is None:
            raise Unavailable(f"not connected to the store at {self._control.address}")
        return self._present

    async def of(self, lease: Lease) -> StoreRun:
        """The run that granted the lease, connecting anew if need be. Raises LeaseEnded."""
        if self._lost or lease.epoch != self.present.epoch:
            await self.connect()
            if lease.epoch != self.present.epoch:
                raise LeaseEnded("the lease is of an earlier run of the store")
        return self.present

    async def connect(self) -> None:
        """Introduces the worker; takes a new transport if the store has restarted."""
        async with self._connecting:
            with typed_errors():
                store = await self._control.stub.Connect(
                    self._introduction, timeout=self._timeout_s
                )
            earlier = self._present
            if earlier is not None and earlier.epoch == store.epoch and not self._lost:
                return
            transport = await self._open_transport(store)
            self._present = StoreRun(store.epoch, transport, store.advertised_address)
            self._lost = False
            if earlier is not None:
                earlier.transport.close()

    def lost(self) -> None:
        """The store is out of reach: let go of its memory until it is used again.

        The kernel keeps the arena of a store that has died for as long as anybody maps it.
        """
        if self._present is not None:
            self._lost = True
            self._present.transport.close()

    def close(self) -> None:
        """Gives up the transport."""
        if self._present is not None:
            self._present.transport.close()

    async def _pin(self, transport: ShmTransport) -> None:
        """Copies work without it."""
        if self._pages is None:
            return
        try:
            await transport.pin(self._pages)
        except Exception:
            _log.exception("shared memory could not be pinned")

    async def _open_transport(self, store: kvstore_pb2.ConnectResponse) -> Transport:
        if self._choice != "grpc" and store.handle_socket:
            try:
                transport = await ShmTransport.open(
                    store.handle_socket, epoch=store.epoch, copier=self._copier
                )
                await self._pin(transport)
                return transport
            except OSError as err:
                if self._choice == "shm":
                    raise Unavailable(f"shared memory of {self._control.address}: {err}") from err
                _log.info("no shared memory with %s, using grpc: %s", self._control.address, err)
        elif self._choice == "shm":
            raise Unavailable(
                f"the store at {self._control.address} has shared memory switched off"
            )
        return GrpcTransport(self._control.stub, self._copier, self._timeout_s)
