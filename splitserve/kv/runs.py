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
    ) -> None:
        self._control = control
        self._copier = copier
        self._introduction = kvstore_pb2.ConnectRequest(
            worker_id=worker_id, kv_layout=layout.to_proto()
        )
        self._choice = choice
        self._timeout_s = rpc_timeout_s
        self._present: StoreRun | None = None
        self._lost = False
        self._num_losses = 0
        self._connecting: asyncio.Task[None] | None = None

    @property
    def present(self) -> StoreRun:
        """The run last connected to. Raises Unavailable before the first."""
        if self._present is None:
            raise Unavailable(f"not connected to the store at {self._control.address}")
        return self._present

    async def of(self, lease: Lease) -> StoreRun:
        """The run that granted the lease, connecting anew if need be. Raises LeaseEnded."""
        if self._lost or lease.epoch != self.present.epoch:
            joined = self._connecting is not None
            await self.connect()
            if joined and lease.epoch != self.present.epoch:
                # What was under way may have asked before the run that granted the lease began.
                await self.connect()
            if lease.epoch != self.present.epoch:
                raise LeaseEnded("the lease is of an earlier run of the store")
        return self.present

    async def connect(self) -> None:
        """Introduces the worker; takes a new transport if the store has restarted.

        Callers share one attempt, and nobody who gives up ends it.
        """
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="store-connect")
            self._connecting.add_done_callback(self._connected)
        await asyncio.shield(self._connecting)

    async def _connect(self) -> None:
        num_losses = self._num_losses
        with typed_errors():
            store = await self._control.stub.Connect(self._introduction, timeout=self._timeout_s)
        earlier = self._present
        if earlier is not None and earlier.epoch == store.epoch and not self._lost:
            return
        transport = await self._open_transport(store)
        self._present = StoreRun(store.epoch, transport, store.advertised_address)
        # One that was lost meanwhile may be the very one that answered.
        self._lost = self._num_losses > num_losses
        if earlier is not None:
            earlier.transport.close()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # looked at, though every caller may have given up

    def lost(self) -> None:
        """The store is out of reach: let go of its memory until it is used again.

        The kernel keeps the arena of a store that has died for as long as anybody maps it.
        """
        self._num_losses += 1
        if self._present is not None:
            self._lost = True
            self._present.transport.close()

    async def close(self) -> None:
        """Ends an attempt to connect, and gives up the transport."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._present is not None:
            self._present.transport.close()

    async def _open_transport(self, store: kvstore_pb2.ConnectResponse) -> Transport:
        if self._choice != "grpc" and store.handle_socket:
            try:
                return await ShmTransport.open(
                    store.handle_socket, epoch=store.epoch, copier=self._copier
                )
            except OSError as err:
                if self._choice == "shm":
                    raise Unavailable(f"shared memory of {self._control.address}: {err}") from err
                _log.info("no shared memory with %s, using grpc: %s", self._control.address, err)
        elif self._choice == "shm":
            raise Unavailable(
                f"the store at {self._control.address} has shared memory switched off"
            )
        return GrpcTransport(self._control.stub, self._copier, self._timeout_s)
