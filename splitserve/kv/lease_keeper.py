"""Keeps a router's leases in one store alive, and ends them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

from splitserve.errors import LeaseEnded, SplitserveError
from splitserve.kv.control import StoreControl
from splitserve.kv.layout import Lease

_log = logging.getLogger(__name__)

_LEASES_PER_CALL = 4096
_LAST_RELEASE_S = 1.0
_T = TypeVar("_T")


class _Kept:
    """One lease in the keeper's care; `good_until` is monotonic seconds, the store's at most."""

    def __init__(self, lease: Lease, good_until: float) -> None:
        self.lease = lease
        self.good_until = good_until
        self.lost = asyncio.Event()


class LeaseKeeper:
    """Grants leases, renews all of them in one call every third of their time to live, releases.

    If the store cannot be reached, leases are given up for lost when their time is up by the
    keeper's own clock; a store that restarted names them as ended at the next renewal. Whoever
    crashes, the store ends what is no longer renewed.
    """

    def __init__(self, control: StoreControl, owner: str, *, ttl_ms: int = 3000) -> None:
        """`owner` is for the store's logs. The control is the caller's to close."""
        self._control = control
        self._owner = owner
        self._ttl_ms = ttl_ms
        self._kept: dict[str, _Kept] = {}
        self._to_release: dict[str, Lease] = {}
        self._release_wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to renew and release, on the running loop."""
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._renew_forever(), name="lease-renewal"),
            loop.create_task(self._release_forever(), name="lease-release"),
        ]

    async def close(self) -> None:
        """Releases every lease, as far as the store can be reached within a second."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for kept in list(self._kept.values()):
            self.release(kept.lease)
        try:
            async with asyncio.timeout(_LAST_RELEASE_S):
                await self._release_waiting()
        except TimeoutError:
            _log.warning("leases were left to run out: the store does not answer")

    def __len__(self) -> int:
        return len(self._kept)

    async def grant(self) -> Lease:
        """A lease that lives until `release`. Raises Overloaded, Unavailable, DeadlineExceeded."""
        asked_at = time.monotonic()
        lease = await self._control.grant_lease(self._owner, self._ttl_ms)
        self._kept[lease.lease_id] = _Kept(lease, asked_at + self._ttl_ms / 1000)
        return lease

    def release(self, lease: Lease) -> None:
        """Ends a lease soon, together with others. Returns at once; twice is no error."""
        if self._kept.pop(lease.lease_id, None) is not None:
            self._to_release[lease.lease_id] = lease
            self._release_wanted.set()

    def check(self, lease: Lease) -> None:
        """Raises LeaseEnded if the lease was lost or released."""
        kept = self._kept.get(lease.lease_id)
        if kept is None or kept.lost.is_set():
            raise LeaseEnded("the lease was lost or released")

    async def wait_lost(self, lease: Lease) -> None:
        """Returns when the lease is lost: the store restarted, or was out of reach for too long.

        Meant to be raced against the request; it does not return because of `release`, so cancel
        it then. Returns at once for a lease that is not kept.
        """
        kept = self._kept.get(lease.lease_id)
        if kept is not None:
            await kept.lost.wait()

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_ms / 3000)
            # One that was given up for lost must not be kept alive behind its holder's back.
            live = [kept for kept in self._kept.values() if not kept.lost.is_set()]
            for part in _batches(live):
                await self._renew(part)

    async def _renew(self, kept: list[_Kept]) -> None:
        asked_at = time.monotonic()
        try:
            ended = set(await self._control.renew([one.lease for one in kept], self._ttl_ms))
        except SplitserveError as err:
            _log.warning("could not renew %d leases: %s", len(kept), err)
            ended = {one.lease.lease_id for one in kept if one.good_until <= time.monotonic()}
        else:
            for one in kept:
                one.good_until = asked_at + self._ttl_ms / 1000
        for one in kept:
            if one.lease.lease_id in ended:
                one.lost.set()

    async def _release_forever(self) -> None:
        while True:
            await self._release_wanted.wait()
            self._release_wanted.clear()
            await self._release_waiting()

    async def _release_waiting(self) -> None:
        """One try. What fails runs out by itself, since it is not renewed any more."""
        waiting, self._to_release = self._to_release, {}
        for part in _batches(waiting.values()):
            try:
                await self._control.release(part)
            except SplitserveError as err:
                _log.warning("%d leases were left to run out: %s", len(part), err)


def _batches(items: Iterable[_T]) -> Iterator[list[_T]]:
    rest = iter(list(items))
    while batch := list(islice(rest, _LEASES_PER_CALL)):
        yield batch
