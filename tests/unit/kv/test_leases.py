"""Leases live exactly as long as they are renewed, by a clock that the test turns."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.kvstore.leases import Leases, new_epoch
from splitserve.errors import InvalidRequest, LeaseEnded, Overloaded

EPOCH = 77


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def leases(clock):
    return Leases(epoch=EPOCH, max_live=3, max_ttl_ms=10_000, clock=clock)


def test_ends_by_the_clock_even_before_it_is_swept(leases, clock):
    lease = leases.grant("router", 1000)
    clock.now += 0.999
    assert leases.check(lease.lease_id, EPOCH).owner == "router"
    clock.now += 0.001
    with pytest.raises(LeaseEnded, match="has ended"):
        leases.check(lease.lease_id, EPOCH)
    assert not leases.renew(lease.lease_id, EPOCH, 1000)
    assert leases.expire() == [lease.lease_id]
    assert leases.expire() == []
    assert leases.num_expired == 1


def test_renewal_extends_and_never_shortens(leases, clock):
    lease = leases.grant("router", 1000)
    assert leases.renew(lease.lease_id, EPOCH, 5000)
    assert leases.renew(lease.lease_id, EPOCH, 1)
    clock.now += 4.9
    assert leases.expire() == []
    leases.check(lease.lease_id, EPOCH)
    clock.now += 0.1
    assert leases.expire() == [lease.lease_id]


def test_another_epoch_is_refused_everywhere(leases):
    lease = leases.grant("router", 1000)
    with pytest.raises(LeaseEnded, match="earlier run"):
        leases.check(lease.lease_id, EPOCH - 1)
    assert not leases.renew(lease.lease_id, EPOCH - 1, 1000)
    assert not leases.release(lease.lease_id, EPOCH - 1)
    leases.check(lease.lease_id, EPOCH)


def test_release_is_once(leases):
    lease = leases.grant("router", 1000)
    assert leases.release(lease.lease_id, EPOCH)
    assert not leases.release(lease.lease_id, EPOCH)
    with pytest.raises(LeaseEnded):
        leases.check(lease.lease_id, EPOCH)


def test_number_is_bounded(leases):
    granted = [leases.grant("router", 1000) for _ in range(3)]
    with pytest.raises(Overloaded) as refused:
        leases.grant("router", 1000)
    assert refused.value.retry_after_s == 1.0
    leases.release(granted[0].lease_id, EPOCH)
    leases.grant("router", 1000)


@pytest.mark.parametrize("ttl_ms", [0, -1, 10_001])
def test_time_to_live_is_bounded(leases, ttl_ms):
    with pytest.raises(InvalidRequest, match="ttl_ms"):
        leases.grant("router", ttl_ms)
    with pytest.raises(InvalidRequest, match="ttl_ms"):
        leases.renew("any", EPOCH, ttl_ms)


def test_epochs_differ_and_grow_with_time():
    epochs = [new_epoch() for _ in range(100)]
    assert len(set(epochs)) == 100
    assert all(0 < epoch < 2**64 for epoch in epochs)


class LeaseMachine(RuleBasedStateMachine):
    """Against a dict from lease to its end."""

    live = Bundle("live")

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.leases = Leases(epoch=EPOCH, max_live=10_000, max_ttl_ms=10_000, clock=self.clock)
        self.ends = {}

    @rule(target=live, ttl_ms=st.integers(1, 10_000))
    def grant(self, ttl_ms):
        lease = self.leases.grant("owner", ttl_ms)
        assert lease.lease_id not in self.ends
        self.ends[lease.lease_id] = self.clock.now + ttl_ms / 1000
        return lease.lease_id

    @rule(lease_id=live, ttl_ms=st.integers(1, 10_000))
    def renew(self, lease_id, ttl_ms):
        is_live = self.ends[lease_id] > self.clock.now
        assert self.leases.renew(lease_id, EPOCH, ttl_ms) is is_live
        if is_live:
            self.ends[lease_id] = max(self.ends[lease_id], self.clock.now + ttl_ms / 1000)

    @rule(lease_id=consumes(live))
    def release(self, lease_id):
        self.leases.release(lease_id, EPOCH)
        self.ends[lease_id] = self.clock.now

    @rule(seconds=st.floats(0, 6))
    def pass_time(self, seconds):
        self.clock.now += seconds

    @rule()
    def sweep(self):
        for lease_id in self.leases.expire():
            assert self.ends[lease_id] <= self.clock.now
        assert len(self.leases) == sum(end > self.clock.now for end in self.ends.values())

    @invariant()
    def only_the_live_pass(self):
        for lease_id, end in self.ends.items():
            if end > self.clock.now:
                self.leases.check(lease_id, EPOCH)
            else:
                with pytest.raises(LeaseEnded):
                    self.leases.check(lease_id, EPOCH)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
