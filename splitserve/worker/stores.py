"""A worker's connections to KV stores: its node's, and any other that a lease names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from splitserve.errors import SplitserveError
from splitserve.kv.client import KvStoreClient
from splitserve.kv.layout import Lease

Connect = Callable[[str], Awaitable[KvStoreClient]]
"""Connects to the store at an address. Raises `SplitserveError` if it does not answer."""

HOME_RETRY_S = 0.5

_log = logging.getLogger(__name__)


class Stores:
    """Clients by address, each connected when first needed.

    The worker serves whether or not its own store is there: it goes on trying to connect, and
    until then blocks are neither handed over nor loaded. A store that restarts is connected anew
    by its client.
    """

    def __init__(self, home: str, connect: Connect) -> None:
        self.home = home
        self._connect = connect
        self._clients: dict[str, KvStoreClient] = {}
        self._opening: dict[str, asyncio.Task[KvStoreClient]] = {}
        self._pool_keys: dict[bytes, None] = {}
        self._connecting: asyncio.Task[None] | None = None

    @property
    def home_address(self) -> str:
        """Where everyone else reaches the node's own store; empty while it is out of reach."""
        home = self._clients.get(self.home)
        return home.advertised_address if home is not None and home.reachable else ""

    def start(self) -> None:
        """Begin to connect to the node's own store."""
        self._connecting = asyncio.create_task(self._connect_home(), name="store-connect")

    async def close(self) -> None:
        """Close every connection."""
        if self._connecting:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        for opening in list(self._opening.values()):
            opening.cancel()
            await asyncio.wait([opening])
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()

    async def open(self, lease: Lease) -> KvStoreClient:
        """The client of the store that granted the lease.

        Raises:
            Unavailable: the store does not answer now.
        """
        return await self._client(lease.store_address or self.home)

    def publish(self, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Tell the node's store what the pool gained and lost, now or once it is connected."""
        home = self._clients.get(self.home)
        if home is not None:
            home.publish(added, removed)
            return
        self._pool_keys.update(dict.fromkeys(added))
        for key in removed:
            self._pool_keys.pop(key, None)

    async def _connect_home(self) -> None:
        told = False
        while True:
            try:
                home = await self._client(self.home)
                _log.info("connected to the store at %s over %s", self.home, home.transport_name)
                return
            except SplitserveError as error:
                if not told:
                    _log.warning("the store at %s is out of reach: %s", self.home, error.message)
                told = True
            await asyncio.sleep(HOME_RETRY_S)

    async def _client(self, address: str) -> KvStoreClient:
        home = self._clients.get(self.home)
        if home is not None and address == home.advertised_address:
            return home
        client = self._clients.get(address)
        if client is not None:
            return client
        opening = self._opening.get(address)
        if opening is None:
            opening = asyncio.create_task(self._open_client(address), name="store-open")
            self._opening[address] = opening
            opening.add_done_callback(lambda task: self._opened(address, task))
        # Others may wait for the same connection, so nobody who gives up ends it.
        return await asyncio.shield(opening)

    async def _open_client(self, address: str) -> KvStoreClient:
        client = await self._connect(address)
        self._clients[address] = client
        if address == self.home:
            client.publish(self._pool_keys, ())
            self._pool_keys.clear()
        return client

    def _opened(self, address: str, task: asyncio.Task[KvStoreClient]) -> None:
        """Nothing is kept of an address where no store was found."""
        del self._opening[address]
        if not task.cancelled():
            task.exception()
