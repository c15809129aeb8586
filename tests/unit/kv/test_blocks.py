"""The block table: examples, then a machine that tries everything at once."""

import hashlib
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.kvstore.block import ReserveOutcome
from services.kvstore.blocks import BlockTable
from services.kvstore.space import PAGE_BYTES, Space
from splitserve.errors import BlockNotFound, InvalidRequest, LeaseEnded, Overloaded
from splitserve.kv.layout import WRITE_GRACE_S, BlockSpec

WRITE, PRESENT, BEING_WRITTEN = ReserveOutcome
FULL_TOKENS = 16
DIGEST = b"d" * 17


def key(name):
    return hashlib.sha256(str(name).encode()).digest()


def spec(name, pages=1, num_tokens=FULL_TOKENS):
    return BlockSpec(key(name), pages * PAGE_BYTES, num_tokens)


class World:
    """A table of `pages` pages and what it told its listeners."""

    def __init__(self, pages=4):
        self.now = 0.0
        self.space = Space(pages * PAGE_BYTES)
        self.committed, self.dropped = [], []
        self.table = BlockTable(
            self.space,
            clock=lambda: self.now,
            may_rest=lambda spec: spec.num_tokens == FULL_TOKENS,
            on_committed=lambda block: self.committed.append(block.key),
            on_dropped=lambda block: self.dropped.append(block.key),
        )

    def put(self, lease, *names, **kwargs):
        self.table.reserve(lease, [spec(name, **kwargs) for name in names])
        self.table.commit(lease, [(key(name), DIGEST) for name in names])

    def outcomes(self, lease, *names):
        return [answer.outcome for answer in self.table.reserve(lease, [spec(n) for n in names])]

    def after_grace(self):
        self.now += WRITE_GRACE_S
        self.table.reclaim()


@pytest.fixture
def world():
    return World()


def test_the_first_writes_and_the_others_hold(world):
    assert world.outcomes("a", 1) == [WRITE]
    assert world.outcomes("b", 1, 2) == [BEING_WRITTEN, WRITE]
    world.table.commit("a", [(key(1), DIGEST)])
    assert world.outcomes("c", 1) == [PRESENT]
    assert world.table.num_held == 2
    world.table.end_lease("a")
    assert world.table.readable("b", key(1)).digest == DIGEST


def test_reserving_again_under_the_same_lease_gives_the_same_place(world):
    first, second = (world.table.reserve("a", [spec(1)])[0] for _ in range(2))
    assert first.outcome is second.outcome is WRITE
    assert first.block.extent == second.block.extent
    with pytest.raises(InvalidRequest, match="size_bytes"):
        world.table.reserve("a", [spec(1, pages=2)])


def test_a_key_twice_or_an_impossible_size_is_refused(world):
    with pytest.raises(InvalidRequest, match="twice"):
        world.table.reserve("a", [spec(1), spec(1)])
    with pytest.raises(InvalidRequest, match="larger"):
        world.table.reserve("a", [spec(1, pages=5)])
    assert world.space.used_bytes == 0


def test_reserve_is_all_or_nothing_and_costs_no_cached_block_in_vain(world):
    world.put("a", 1)
    world.table.end_lease("a")
    world.put("b", 2)
    with pytest.raises(Overloaded) as refused:
        world.table.reserve("c", [spec(10 + at) for at in range(4)])
    assert refused.value.retry_after_s == WRITE_GRACE_S
    assert world.table.num_evicted == 0
    assert world.table.num_reserved == 0
    assert world.space.used_bytes == 2 * PAGE_BYTES
    assert world.outcomes("c", 11, 12, 13) == [WRITE] * 3
    assert world.dropped == [key(1)]


def test_what_is_asked_for_is_not_evicted_for_the_rest(world):
    world.put("a", 1, 2, 3, 4)
    world.table.end_lease("a")
    assert world.outcomes("b", 1, 9) == [PRESENT, WRITE]
    assert key(1) not in world.dropped


def test_evicts_the_least_recent_first_and_of_one_prompt_the_tail_first(world):
    world.put("a", "a0", "a1")
    world.put("b", "b0", "b1")
    world.table.end_lease("b")
    world.table.end_lease("a")
    for at, victim in enumerate(["b1", "b0", "a1", "a0"]):
        world.outcomes("c", f"new{at}")
        assert world.dropped[at:] == [key(victim)]


def test_a_hold_makes_recent(world):
    world.put("a", 1, 2)
    world.table.end_lease("a")
    world.table.hold("b", key(2))
    world.table.end_lease("b")
    world.outcomes("c", 7, 8, 9)
    assert world.dropped == [key(1)]


def test_fragmented_space_is_freed_until_the_block_fits(world):
    world.put("a", 1, 2, 3, 4)
    world.table.hold("b", key(2))
    world.table.end_lease("a")
    with pytest.raises(Overloaded):
        world.table.reserve("c", [spec(9, pages=3)])  # three pages are free, but not in a row
    assert world.table.num_reserved == 0
    assert world.outcomes("c", 5) == [WRITE]


def test_a_partial_block_goes_with_its_last_hold(world):
    world.put("a", 1, num_tokens=3)
    world.table.hold("b", key(1))
    world.table.end_lease("a")
    assert world.dropped == []
    world.table.end_lease("b")
    assert world.dropped == [key(1)]
    assert world.space.used_bytes == 0


def test_space_of_a_lost_writer_is_not_reused_within_the_grace(world):
    world.table.reserve("a", [spec(1, pages=4)])
    world.table.hold("b", key(1))
    world.table.end_lease("a")
    assert world.dropped == [key(1)]
    with pytest.raises(Overloaded):
        world.table.reserve("c", [spec(2)])
    world.now += WRITE_GRACE_S - 0.01
    world.table.reclaim()
    assert world.space.free_bytes == 0
    world.now += 0.01
    world.table.reclaim()
    assert world.outcomes("c", 2) == [WRITE]
    world.table.end_lease("b")


def test_commit_is_all_or_none_and_only_by_the_writer(world):
    world.table.reserve("a", [spec(1)])
    with pytest.raises(LeaseEnded, match="not reserved"):
        world.table.commit("b", [(key(1), DIGEST)])
    with pytest.raises(LeaseEnded, match="not reserved"):
        world.table.commit("a", [(key(1), DIGEST), (key(2), DIGEST)])
    assert world.committed == []
    world.table.commit("a", [(key(1), DIGEST)])
    world.table.commit("a", [(key(1), DIGEST)])
    assert world.committed == [key(1)]
    with pytest.raises(LeaseEnded, match="not reserved"):
        world.table.commit("a", [(key(1), b"e" * 16)])


def test_abandon_touches_only_what_the_lease_reserved(world):
    world.put("a", 1)
    world.table.reserve("a", [spec(2)])
    world.table.reserve("b", [spec(3)])
    world.table.abandon("a", [key(name) for name in (1, 2, 3, 4)])
    assert world.dropped == [key(2)]


def test_reading_needs_a_hold_and_a_commit(world):
    world.table.reserve("a", [spec(1)])
    with pytest.raises(BlockNotFound):
        world.table.readable("a", key(1))
    world.table.commit("a", [(key(1), DIGEST)])
    assert world.table.readable("a", key(1)).num_tokens == FULL_TOKENS
    with pytest.raises(BlockNotFound):
        world.table.readable("b", key(1))


def test_a_prefix_ends_at_the_first_gap(world):
    world.put("a", 0, 1, 3)
    world.table.reserve("a", [spec(2)])
    assert world.table.prefix_length([key(at) for at in range(4)]) == 2
    assert world.table.prefix_length([key(0)]) == 1
    assert world.table.prefix_length([]) == 0


LEASES = st.sampled_from("abcd")
NAMES = st.integers(0, 11)


def test_a_damaged_block_frees_its_key_at_once_and_its_space_with_its_last_holder(world):
    world.put("a", 1)
    world.table.hold("b", key(1))
    assert world.table.drop_damaged("b", key(1), DIGEST)
    assert world.dropped == [key(1)]
    assert world.table.hold("c", key(1)) is None
    with pytest.raises(BlockNotFound):
        world.table.readable("a", key(1))
    assert world.outcomes("b", 1) == [WRITE]  # elsewhere, though the lease still holds the old one
    world.table.commit("b", [(key(1), DIGEST)])
    world.table.end_lease("b")
    assert world.space.used_bytes == 2 * PAGE_BYTES
    world.table.end_lease("a")
    assert world.space.used_bytes == PAGE_BYTES
    assert world.outcomes("c", 1) == [PRESENT]


def test_only_what_the_lease_read_is_dropped(world):
    world.put("a", 1)
    world.table.reserve("a", [spec(2)])
    assert not world.table.drop_damaged("a", key(1), b"x" * 16)
    assert not world.table.drop_damaged("b", key(1), DIGEST)
    assert not world.table.drop_damaged("a", key(2), b"")
    assert not world.table.drop_damaged("a", key(3), DIGEST)
    assert (world.dropped, len(world.table)) == ([], 2)


def spec_of(name):
    """Sizes of 1 to 3 pages; every third block is partial."""
    return spec(name, pages=1 + name % 3, num_tokens=5 if name % 3 == 0 else FULL_TOKENS)


class BlockMachine(RuleBasedStateMachine):
    """Leases a..d do anything in any order with blocks 0..11 in ten pages."""

    def __init__(self):
        super().__init__()
        self.world = World(pages=10)
        self.holds = {lease: set() for lease in "abcd"}
        self.writers = {}
        self.digests = {}
        self.damaged = []  # (extent, leases that may still read it)

    def forget(self, name_key):
        self.writers.pop(name_key, None)
        self.digests.pop(name_key, None)
        for held in self.holds.values():
            held.discard(name_key)

    def note_dropped(self):
        for name_key in self.world.dropped:
            # only what nobody holds is evicted; a lost writer's blocks are told apart by `writers`
            held = any(name_key in held for held in self.holds.values())
            assert not held or name_key in self.writers
            self.forget(name_key)
        self.world.dropped.clear()

    @rule(lease=LEASES, names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
    def reserve(self, lease, names):
        used = self.world.space.used_bytes
        specs = [spec_of(name) for name in names]
        try:
            answers = self.world.table.reserve(lease, specs)
        except Overloaded:
            assert self.world.space.used_bytes <= used
            self.note_dropped()
            return
        self.note_dropped()
        for one, answer in zip(specs, answers, strict=True):
            if one.key in self.digests:
                assert answer.outcome is PRESENT
            elif self.writers.get(one.key, lease) == lease:
                assert answer.outcome is WRITE
                self.writers[one.key] = lease
            else:
                assert answer.outcome is BEING_WRITTEN
            self.holds[lease].add(one.key)

    @rule(lease=LEASES, name=NAMES)
    def commit(self, lease, name):
        try:
            self.world.table.commit(lease, [(key(name), DIGEST)])
        except LeaseEnded:
            assert self.writers.get(key(name)) != lease
            return
        if self.writers.pop(key(name), None) is None:
            assert self.digests[key(name)] == DIGEST
        self.digests[key(name)] = DIGEST

    @rule(lease=LEASES, name=NAMES)
    def hold(self, lease, name):
        block = self.world.table.hold(lease, key(name))
        assert (block is not None) == (key(name) in self.writers or key(name) in self.digests)
        if block is not None:
            self.holds[lease].add(key(name))

    @rule(lease=LEASES, name=NAMES)
    def abandon(self, lease, name):
        mine = self.writers.get(key(name)) == lease
        self.world.table.abandon(lease, [key(name)])
        assert self.world.dropped == ([key(name)] if mine else [])
        self.note_dropped()

    @rule(lease=LEASES, name=NAMES)
    def drop_damaged(self, lease, name):
        mine = key(name) in self.digests and key(name) in self.holds[lease]
        extents = {block.key: block.extent for block in self.world.table}
        assert self.world.table.drop_damaged(lease, key(name), DIGEST) == mine
        if mine:
            holders = {holder for holder, held in self.holds.items() if key(name) in held}
            self.damaged.append((extents[key(name)], holders))
            self.world.dropped.remove(key(name))
            self.forget(key(name))

    @rule(lease=LEASES)
    def end_lease(self, lease):
        for _, holders in self.damaged:
            holders.discard(lease)
        self.damaged = [(extent, holders) for extent, holders in self.damaged if holders]
        self.holds[lease].clear()
        self.world.table.end_lease(lease)
        self.note_dropped()
        assert lease not in self.writers.values()

    @rule(seconds=st.floats(0, 2 * WRITE_GRACE_S))
    def pass_time(self, seconds):
        self.world.now += seconds
        self.world.table.reclaim()

    @invariant()
    def no_two_blocks_share_a_byte_and_none_is_lost(self):
        blocks = list(self.world.table)
        assert {block.key for block in blocks} == self.writers.keys() | self.digests.keys()
        taken = [(block.extent.offset, block.extent.end) for block in blocks]
        free = [(extent.offset, extent.end) for extent in self.world.space.free_extents()]
        damaged = [(extent.offset, extent.end) for extent, _ in self.damaged]
        spans = sorted(taken + free + damaged)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))

    @invariant()
    def counts_agree(self):
        table = self.world.table
        assert table.num_reserved == len(self.writers)
        assert table.num_committed == len(self.digests)
        held = set().union(*self.holds.values())
        assert table.num_held == len(held | self.writers.keys())

    def teardown(self):
        for lease in "abcd":
            self.world.table.end_lease(lease)
        self.world.after_grace()
        table = self.world.table
        assert (table.num_reserved, table.num_held) == (0, 0)
        resting = len(table)
        assert self.world.space.used_bytes >= resting * PAGE_BYTES
        # Nothing is lost: the whole arena can be had by evicting what rests.
        table.reserve("z", [spec("all", pages=10)])
        assert len(table) == 1


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
