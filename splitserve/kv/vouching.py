"""How a shared-memory writer knows that it may still write.

The store does not see writes to shared memory, so the writer must not begin one that could still
run when its space is given to another. The store keeps such space unused for WRITE_GRACE_S after
the lease ended; a lease that was live when the store was asked is therefore good for a copy that
begins within half of that, and the other half is left for the copy itself.
"""

from __future__ import annotations

import asyncio
import time

from splitserve.errors import LeaseEnded
from splitserve.kv.control import StoreControl
from splitserve.kv.layout import WRITE_GRACE_S, Lease

_GOOD_FOR_S = WRITE_GRACE_S / 2
_PRUNE_ABOVE = 1024


class Vouching:
    """When the store last vouched for each lease. One call asks for all who wait for it."""

    def __init__(self, control: StoreControl) -> None:
        self._control = control
        self._good_until: dict[str, float] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    @staticmethod
    def now() -> float:
        """To be taken before the call whose success vouches for a lease."""
        return time.monotonic()

    def vouched(self, lease: Lease, asked_at: float) -> None:
        """A call under the lease that was sent at `asked_at` succeeded."""
        if len(self._good_until) > _PRUNE_ABOVE:
            now = self.now()
            self._good_until = {
                lease_id: until for lease_id, until in self._good_until.items() if until > now
            }
        self._good_until[lease.lease_id] = asked_at + _GOOD_FOR_S

    async def ensure(self, lease: Lease) -> float:
        """Until when, by `now`, a copy may begin; asks the store if need be. Raises LeaseEnded."""
        while (good_until := self._good_until.get(lease.lease_id, 0.0)) <= self.now():
            lock = self._asking.setdefault(lease.lease_id, asyncio.Lock())
            try:
                async with lock:
                    if self._good_until.get(lease.lease_id, 0.0) <= self.now():
                        await self.ask(lease)
            finally:
                self._asking.pop(lease.lease_id, None)
        return good_until

    async def ask(self, lease: Lease) -> None:
        """Asks the store whether the lease is live. Raises LeaseEnded."""
        asked_at = self.now()
        # One millisecond: renewing never shortens a lease, and this does not keep it alive.
        if await self._control.renew([lease], ttl_ms=1):
            self._good_until.pop(lease.lease_id, None)
            raise LeaseEnded("the lease has ended")
        self.vouched(lease, asked_at)
