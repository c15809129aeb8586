"""Blocks that stay in workers' pools: who shared one is told once that it is gone, not before."""

import hashlib
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.kvstore.block import PoolPlace, ReserveOutcome
from services.kvstore.blocks import BlockTable
from services.kvstore.space import PAGE_BYTES, Space
from splitserve.errors import InvalidRequest, LeaseEnded, Overloaded
from splitserve.kv.layout import WRITE_GRACE_S, BlockSpec

WRITE, PRESENT, BEING_WRITTEN = ReserveOutcome
DIGEST = b"d" * 17
LEASES, NAMES, POOLS = st.sampled_from("abc"), st.integers(0, 5), st.integers(1, 2)


def key(name):
    return hashlib.sha256(str(name).encode()).digest()


def spec(name):
    return BlockSpec(key(name), PAGE_BYTES, 16)


class World:
    """A table of `pages` pages, and which shares it has not ended."""

    def __init__(self, pages=4):
        self.now = 0.0
        self.space = Space(pages * PAGE_BYTES)
        self.live, self.stuck = set(), []
        self.table = BlockTable(
            self.space,
            clock=lambda: self.now,
            may_rest=lambda spec: True,
            on_committed=self.began,
            on_dropped=self.ended,
            on_moved=self.ended,
            on_stuck=lambda block: self.stuck.append(block.key),
        )
        self._shares = count(1)

    def began(self, block):
        if block.pool is not None:
            self.live.add((block.key, block.pool.share_id))

    def ended(self, block):
        if block.pool is not None:
            self.live.remove((block.key, block.pool.share_id))

    def reserve(self, lease, *names, stays=True):
        return self.table.reserve(lease, [spec(name) for name in names], lambda _: stays)

    def share(self, lease, name, pool=1):
        place = PoolPlace(pool, page=7, share_id=next(self._shares), lease_id=lease)
        self.table.share(lease, [(key(name), DIGEST, place)])

    def put(self, lease, name, pool=1):
        self.reserve(lease, name)
        self.share(lease, name, pool)


@pytest.fixture
def world():
    return World()


def test_what_stays_takes_no_space_and_never_rests(world):
    for name in range(9):  # more than the arena could hold
        world.put("a", name)
    assert world.space.used_bytes == 0
    assert world.table.num_held == 9
    world.table.end_lease("a")
    assert len(world.table) == 0
    assert world.live == set()


def test_the_last_of_its_readers_ends_it(world):
    world.put("a", 1)
    assert world.reserve("b", 1)[0].outcome is PRESENT
    world.table.let_go("a", [key(1), key(2)])
    assert len(world.live) == 1
    world.table.let_go("b", [key(1)])
    assert world.live == set()
    assert world.table.hold("a", key(1)) is None


def test_what_was_read_before_its_commit_goes_with_it(world):
    world.reserve("a", 1, 2)
    world.table.hold("b", key(2))
    world.table.let_go("a", [key(1), key(2)])
    assert world.table.num_held == 2, "it is yet to be committed"
    world.share("a", 1)
    assert world.table.hold("c", key(1)) is None
    world.share("a", 2)
    assert [block.holders for block in world.table] == [{"b"}]


@pytest.mark.parametrize("awaited", [True, False])
def test_reserved_or_awaited_anew_it_is_needed_again(world, awaited):
    world.reserve("a", 1)
    world.table.let_go("a", [key(1)])
    if awaited:
        world.table.hold("a", key(1))
    else:
        world.reserve("a", 1)
    world.share("a", 1)
    assert len(world.live) == 1


def test_what_is_in_the_arena_is_not_let_go(world):
    world.reserve("a", 1, stays=False)
    world.table.commit("a", [(key(1), DIGEST)])
    world.table.let_go("a", [key(1)])
    assert world.table.num_held == 1


def test_reserved_anew_it_is_written_to_the_arena(world):
    world.put("a", 1)
    assert world.reserve("b", 1, stays=False)[0].outcome is PRESENT, "another's is left alone"
    (answer,) = world.reserve("a", 1, stays=False)
    assert answer.outcome is WRITE
    assert answer.block.extent is not None
    assert world.live == set()
    assert world.table.num_reserved == 1
    world.table.commit("a", [(key(1), DIGEST)])
    world.table.end_lease("a")
    world.table.end_lease("b")
    assert len(world.table) == 1, "in the arena it may rest"


def test_with_no_room_it_stays_as_it_is(world):
    world.reserve("z", *range(10, 14), stays=False)
    world.put("a", 1)
    with pytest.raises(Overloaded):
        world.reserve("a", 1, stays=False)
    assert len(world.live) == 1
    assert world.table.readable("a", key(1)).pool is not None


def test_the_end_of_the_sharing_lease_is_told_if_others_hold_it(world):
    world.put("a", 1)
    world.table.hold("b", key(1))
    world.table.end_lease("a")
    assert world.stuck == [key(1)]
    assert len(world.live) == 1
    world.table.end_lease("b")
    assert world.live == set()


def test_a_pool_takes_its_blocks_with_it(world):
    world.put("a", 1, pool=1)
    world.put("a", 2, pool=2)
    world.table.drop_pool(1)
    assert [block.key for block in world.table] == [key(2)]
    world.table.drop_pool(3)


def test_reserved_anew_before_it_is_whole_it_gets_space(world):
    world.reserve("a", 1)
    (answer,) = world.reserve("a", 1, stays=False)
    assert answer.outcome is WRITE
    assert answer.block.extent is not None
    assert world.table.num_reserved == 1
    world.table.commit("a", [(key(1), DIGEST)])


def test_shared_again_it_must_be_the_same_at_the_same_place(world):
    world.reserve("a", 1, 2)
    place = PoolPlace(1, page=7, share_id=1, lease_id="a")
    first, second = (key(1), DIGEST, place), (key(2), DIGEST, place)
    world.table.share("a", [first])
    world.table.share("a", [first, second, second])
    assert world.table.num_reserved == 0
    assert world.table.num_committed == 2
    for other in (
        (key(1), b"e" * 16, place),
        (key(1), DIGEST, PoolPlace(1, page=8, share_id=1, lease_id="a")),
    ):
        with pytest.raises(LeaseEnded):
            world.table.share("a", [other])
    with pytest.raises(LeaseEnded):
        world.table.share("b", [first])


def test_a_commit_must_fit_the_reservation(world):
    world.reserve("a", 1)
    with pytest.raises(InvalidRequest, match="must be in_pool"):
        world.table.commit("a", [(key(1), DIGEST)])
    world.reserve("a", 2, stays=False)
    with pytest.raises(InvalidRequest, match="must be blocks"):
        world.share("a", 2)
    with pytest.raises(LeaseEnded):
        world.share("b", 1)


class PoolMachine(RuleBasedStateMachine):
    """Leases a..c share, read, move and give up blocks 0..5 in two pools and four pages."""

    def __init__(self):
        super().__init__()
        self.world = World()

    def block(self, name):
        return next((block for block in self.world.table if block.key == key(name)), None)

    @rule(lease=LEASES, name=NAMES, stays=st.booleans())
    def reserve(self, lease, name, stays):
        try:
            (answer,) = self.world.reserve(lease, name, stays=stays)
        except Overloaded:
            return
        assert lease in answer.block.holders
        if answer.outcome is WRITE and not stays:
            assert answer.block.extent is not None

    @rule(lease=LEASES, name=NAMES, pool=POOLS)
    def share(self, lease, name, pool):
        block = self.block(name)
        if block is not None and block.writer == lease and block.extent is None:
            self.world.share(lease, name, pool)
        else:
            with pytest.raises((LeaseEnded, InvalidRequest)):
                self.world.share(lease, name, pool)

    @rule(lease=LEASES, name=NAMES)
    def commit(self, lease, name):
        block = self.block(name)
        if block is not None and block.writer == lease and block.extent is not None:
            self.world.table.commit(lease, [(key(name), DIGEST)])

    @rule(lease=LEASES, name=NAMES)
    def hold(self, lease, name):
        self.world.table.hold(lease, key(name))

    @rule(lease=LEASES, name=NAMES)
    def let_go(self, lease, name):
        self.world.table.let_go(lease, [key(name)])
        block = self.block(name)
        assert block is None or block.pool is None or lease not in block.holders

    @rule(lease=LEASES, name=NAMES)
    def abandon(self, lease, name):
        self.world.table.abandon(lease, [key(name)])

    @rule(lease=LEASES, name=NAMES)
    def drop_damaged(self, lease, name):
        self.world.table.drop_damaged(lease, key(name), DIGEST)

    @rule(pool=POOLS)
    def drop_pool(self, pool):
        self.world.table.drop_pool(pool)
        assert all(block.pool is None or block.pool.pool_id != pool for block in self.world.table)

    @rule(lease=LEASES)
    def end_lease(self, lease):
        self.world.table.end_lease(lease)
        assert all(lease not in block.holders for block in self.world.table)

    @rule()
    def pass_time(self):
        self.world.now += WRITE_GRACE_S
        self.world.table.reclaim()

    @invariant()
    def shares_live_as_long_as_their_blocks(self):
        in_pools = [block for block in self.world.table if block.pool is not None]
        assert self.world.live == {(block.key, block.pool.share_id) for block in in_pools}
        assert all(block.committed and block.extent is None for block in in_pools)
        assert all(block.holders for block in in_pools)

    @invariant()
    def each_block_is_in_one_place(self):
        for block in self.world.table:
            if block.committed:
                assert (block.extent is None) != (block.pool is None)
            else:
                assert block.pool is None
                assert block.writer in block.holders
        assert self.world.table.num_reserved == sum(
            not block.committed for block in self.world.table
        )

    def teardown(self):
        for lease in "abc":
            self.world.table.end_lease(lease)
        assert self.world.live == set()
        self.pass_time()
        self.world.reserve("z", *range(10, 14), stays=False)
        assert len(self.world.table) == 4


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
