"""The KV stores that workers name: leases on them, and lookups in their directories."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from splitserve.errors import DeadlineExceeded, SplitserveError, Unavailable
from splitserve.kv.control import StoreControl
from splitserve.kv.layout import Lease
from splitserve.kv.lease_keeper import LeaseKeeper
from splitserve.rpc.tls import TlsConfig

_log = logging.getLogger(__name__)

PAUSE_AFTER_FAILURE_S = 1.0
"""For so long a store that failed is not asked again, so that it delays one request, not all."""


_NO_ANSWER = (Unavailable, DeadlineExceeded)


class HeldLease:
    """A lease that is renewed until `release`. `store_address` is where the store was reached."""

    def __init__(self, store_address: str, lease: Lease, keeper: LeaseKeeper) -> None:
        self.store_address = store_address
        self.ref = lease.to_proto()
        self._lease = lease
        self._keeper = keeper

    def release(self) -> None:
        """End it in the background. Idempotent."""
        self._keeper.release(self._lease)


class _Store:
    """One store and when it may be asked again. `num_calls` counts those that are under way."""

    def __init__(self, control: StoreControl, keeper: LeaseKeeper) -> None:
        self.control = control
        self.keeper = keeper
        self.paused_until_s = 0.0
        self.num_calls = 0

    @property
    def idle(self) -> bool:
        """Whether no request has to do with it."""
        return not self.num_calls and not len(self.keeper)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around each call, so that its channel is not closed under it."""
        self.num_calls += 1
        try:
            yield
        finally:
            self.num_calls -= 1

    async def close(self) -> None:
        """Release its leases and close its channel."""
        await self.keeper.close()
        await self.control.close()


class Stores:
    """All stores, each reached over one channel that is opened when first needed."""

    def __init__(
        self,
        owner: str,
        *,
        ttl_ms: int,
        rpc_timeout_s: float,
        tls: TlsConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner = owner
        self._ttl_ms = ttl_ms
        self._rpc_timeout_s = rpc_timeout_s
        self._tls = tls
        self._clock = clock
        self._stores: dict[str, _Store] = {}

    @property
    def num_leases(self) -> int:
        """Leases that are being renewed."""
        return sum(len(store.keeper) for store in self._stores.values())

    async def close(self) -> None:
        """Release all leases and close all channels."""
        stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            await store.close()

    @property
    def num_stores(self) -> int:
        """Stores to which a channel is open."""
        return len(self._stores)

    async def prune(self, addresses: Collection[str]) -> None:
        """Forget stores that are not at `addresses`; one that a request still uses stays."""
        gone = [a for a, store in self._stores.items() if a not in addresses and store.idle]
        for store in [self._stores.pop(address) for address in gone]:
            await store.close()

    async def grant(self, address: str) -> HeldLease:
        """A lease of the store at `address`. Raises Overloaded, Unavailable, DeadlineExceeded."""
        store = self._at(address)
        if self._clock() < store.paused_until_s:
            raise Unavailable(f"store {address} failed a moment ago")
        try:
            with store.calling():
                return HeldLease(address, await store.keeper.grant(), store.keeper)
        except _NO_ANSWER as error:
            self._pause(store, error)
            raise

    def discard(self, granting: asyncio.Task[HeldLease | None]) -> None:
        """Give up a grant that may be still on its way: what it gets is released."""
        granting.cancel()
        granting.add_done_callback(_release_result)

    async def lookup(self, addresses: Collection[str], keys: Sequence[bytes]) -> dict[str, int]:
        """How many blocks of the chain each holder has. A store that fails knows nothing."""
        if not keys:
            return {}
        found: dict[str, int] = {}
        answers = await asyncio.gather(*(self._lookup(address, keys) for address in addresses))
        for answer in answers:
            for holder, num_blocks in answer.items():
                found[holder] = max(num_blocks, found.get(holder, 0))
        return found

    async def _lookup(self, address: str, keys: Sequence[bytes]) -> dict[str, int]:
        store = self._at(address)
        if self._clock() < store.paused_until_s:
            return {}
        try:
            with store.calling():
                return await store.control.lookup(keys)
        except _NO_ANSWER as error:
            self._pause(store, error)
        except SplitserveError as error:
            _log.warning("store %s refused a lookup: %s", address, error.message)
        return {}

    def _pause(self, store: _Store, error: SplitserveError) -> None:
        if self._clock() >= store.paused_until_s:
            _log.warning("store %s does not answer: %s", store.control.address, error.message)
        store.paused_until_s = self._clock() + PAUSE_AFTER_FAILURE_S

    def _at(self, address: str) -> _Store:
        store = self._stores.get(address)
        if store is None:
            # An empty context: what is started here outlives the request that needed it first.
            store = contextvars.Context().run(self._open, address)
            self._stores[address] = store
        return store

    def _open(self, address: str) -> _Store:
        control = StoreControl(address, tls=self._tls, rpc_timeout_s=self._rpc_timeout_s)
        keeper = LeaseKeeper(control, self._owner, ttl_ms=self._ttl_ms)
        keeper.start()
        return _Store(control, keeper)


def _release_result(granting: asyncio.Task[HeldLease | None]) -> None:
    if granting.cancelled() or granting.exception() is not None:
        return
    lease = granting.result()
    if lease is not None:
        lease.release()
