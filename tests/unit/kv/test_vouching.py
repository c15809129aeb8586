"""A shared-memory copy begins only shortly after the store said that its lease is live."""

import asyncio

import pytest

from splitserve.errors import LeaseEnded, Unavailable
from splitserve.kv.layout import WRITE_GRACE_S, Lease
from splitserve.kv.vouching import Vouching

LEASE = Lease("id", 1, "here")


class Control:
    """Counts how often it is asked; `ended` and `error` are its answers."""

    def __init__(self):
        self.asked, self.ended, self.error = 0, [], None

    async def renew(self, leases, ttl_ms):
        self.asked += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return [lease.lease_id for lease in leases if lease.lease_id in self.ended]


@pytest.fixture
def control():
    return Control()


@pytest.fixture
def time_is(monkeypatch):
    def set_time(now):
        monkeypatch.setattr(Vouching, "now", staticmethod(lambda: now))

    set_time(100.0)
    return set_time


async def test_a_fresh_answer_is_good_for_half_of_the_grace(control, time_is):
    vouching = Vouching(control)
    vouching.vouched(LEASE, 100.0)
    time_is(100.0 + 0.49 * WRITE_GRACE_S)
    assert await vouching.ensure(LEASE) == 100.0 + 0.5 * WRITE_GRACE_S
    assert control.asked == 0
    time_is(100.0 + 0.5 * WRITE_GRACE_S)
    assert await vouching.ensure(LEASE) == 100.0 + WRITE_GRACE_S
    assert control.asked == 1


async def test_many_writers_ask_once(control, time_is):
    vouching = Vouching(control)
    await asyncio.gather(*(vouching.ensure(LEASE) for _ in range(20)))
    assert control.asked == 1


async def test_an_ended_lease_stops_every_writer(control, time_is):
    vouching = Vouching(control)
    control.ended = [LEASE.lease_id]
    outcomes = await asyncio.gather(
        *(vouching.ensure(LEASE) for _ in range(3)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [LeaseEnded] * 3


async def test_a_store_that_is_gone_vouches_for_nothing(control, time_is):
    vouching = Vouching(control)
    control.error = Unavailable("gone")
    with pytest.raises(Unavailable):
        await vouching.ensure(LEASE)
    control.error = None
    await vouching.ensure(LEASE)


async def test_what_is_remembered_is_bounded(control, time_is):
    vouching = Vouching(control)
    for at in range(3000):
        time_is(100.0 + at)
        vouching.vouched(Lease(str(at), 1, "here"), 100.0 + at)
    assert len(vouching._good_until) <= 1100
    assert vouching._asking == {}
