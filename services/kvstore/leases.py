"""Who may hold blocks, and until when.

A lease is a capability: its id cannot be guessed, and it is good only together with the epoch of
the run of the store that granted it. Time is the caller's monotonic seconds, so that a change of
the wall clock ends no lease.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from splitserve.errors import InvalidRequest, LeaseEnded, Overloaded

Clock = Callable[[], float]


def new_epoch() -> int:
    """A number that no other run of a store has: wall-clock nanoseconds, low 20 bits random.

    The random bits (a millisecond's worth) keep two runs apart even if the clock was set back.
    """
    return (time.time_ns() >> 20 << 20) | secrets.randbits(20)


@dataclass(slots=True)
class LeaseRecord:
    """One live lease. `expires_at` is in the clock's seconds."""

    lease_id: str
    owner: str
    expires_at: float


class Leases:
    """The live leases of one run of the store."""

    def __init__(self, *, epoch: int, max_live: int, max_ttl_ms: int, clock: Clock) -> None:
        self.epoch = epoch
        self._max_live = max_live
        self._max_ttl_ms = max_ttl_ms
        self._clock = clock
        self._live: dict[str, LeaseRecord] = {}
        # (time, lease id); an entry is stale when the lease was extended or ended since.
        self._deadlines: list[tuple[float, str]] = []
        self.num_expired = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LeaseRecord]:
        return iter(self._live.values())

    def grant(self, owner: str, ttl_ms: int) -> LeaseRecord:
        """A new lease. Raises InvalidRequest for a bad `ttl_ms`, Overloaded when there are too
        many.
        """
        self._check_ttl(ttl_ms)
        if len(self._live) >= self._max_live:
            raise Overloaded(f"{self._max_live} leases are live", retry_after_s=ttl_ms / 1000)
        lease = LeaseRecord(secrets.token_hex(16), owner, self._clock() + ttl_ms / 1000)
        self._live[lease.lease_id] = lease
        heapq.heappush(self._deadlines, (lease.expires_at, lease.lease_id))
        return lease

    def check(self, lease_id: str, epoch: int) -> LeaseRecord:
        """The lease, if it is live by the clock, swept or not. Raises LeaseEnded."""
        lease = self._live.get(lease_id) if epoch == self.epoch else None
        if lease is None or lease.expires_at <= self._clock():
            raise LeaseEnded(
                "the lease is of an earlier run of the store"
                if epoch != self.epoch
                else "the lease has ended"
            )
        return lease

    def is_live(self, lease_id: str) -> bool:
        """Whether a lease of this epoch is live by the clock."""
        lease = self._live.get(lease_id)
        return lease is not None and lease.expires_at > self._clock()

    def renew(self, lease_id: str, epoch: int, ttl_ms: int) -> bool:
        """Extends a lease to at least `ttl_ms` from now, never shortens it. False: it has ended."""
        self._check_ttl(ttl_ms)
        try:
            lease = self.check(lease_id, epoch)
        except LeaseEnded:
            return False
        lease.expires_at = max(lease.expires_at, self._clock() + ttl_ms / 1000)
        return True

    def release(self, lease_id: str, epoch: int) -> bool:
        """Ends a lease now. False: it had ended already."""
        return epoch == self.epoch and self._live.pop(lease_id, None) is not None

    def expire(self) -> list[str]:
        """Ends every lease whose time is up and names them."""
        now, ended = self._clock(), []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, lease_id = heapq.heappop(self._deadlines)
            lease = self._live.get(lease_id)
            if lease is None:
                continue
            if lease.expires_at <= now:
                del self._live[lease_id]
                ended.append(lease_id)
                self.num_expired += 1
            else:
                heapq.heappush(self._deadlines, (lease.expires_at, lease_id))
        return ended

    def _check_ttl(self, ttl_ms: int) -> None:
        if not 0 < ttl_ms <= self._max_ttl_ms:
            raise InvalidRequest.single("ttl_ms", f"must be in 1..{self._max_ttl_ms}")
