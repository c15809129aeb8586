"""The store as one thing: waiting, reading, and nothing that outlives its lease."""

import asyncio
import hashlib

import pytest

from services.kvstore.arena import Arena
from services.kvstore.space import PAGE_BYTES
from services.kvstore.store import Store, StoreLimits
from splitserve.errors import (
    BlockNotFound,
    BlockOutOfRange,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
)
from splitserve.kv.layout import MAX_PART_BYTES, BlockSpec, KvLayout, Lease

SIZE = PAGE_BYTES
LAYOUT = KvLayout(b"m" * 32, 16, SIZE)
LIMITS = StoreLimits(max_leases=8, max_lease_ttl_ms=5000, max_awaiting_calls=3, max_awaited_keys=5)
DIGEST = b"d" * 17


def key(name):
    return hashlib.sha256(str(name).encode()).digest()


class Watcher:
    def __init__(self):
        self.keys = set()

    def added(self, key):
        assert key not in self.keys
        self.keys.add(key)

    def removed(self, key):
        self.keys.remove(key)


class World:
    def __init__(self, arena):
        self.now = 0.0
        self.watcher = Watcher()
        self.store = Store(arena, limits=LIMITS, clock=lambda: self.now, watcher=self.watcher)
        self.store.introduce(LAYOUT)

    def lease(self, ttl_ms=1000):
        record = self.store.grant("owner", ttl_ms)
        return Lease(record.lease_id, self.store.epoch, "here")

    def reserve(self, lease, *names, num_tokens=16):
        specs = [BlockSpec(key(name), SIZE, num_tokens) for name in names]
        return self.store.reserve(lease, specs)

    def commit(self, lease, *names):
        self.store.commit(lease, [(key(name), DIGEST) for name in names])

    def wait(self, lease, *names, wait_for_writer=False):
        return self.store.start_await(lease, [key(name) for name in names], wait_for_writer)

    def pass_time(self, seconds):
        self.now += seconds
        self.store.sweep()


@pytest.fixture
def world():
    arena = Arena(8 * SIZE)
    yield World(arena)
    arena.close()


async def decided(awaiter):
    ready, missing = [], []
    async with asyncio.timeout(5):
        async for some_ready, some_missing in awaiter.batches():
            ready += [block.key for block in some_ready]
            missing += some_missing
    return set(ready), set(missing)


async def test_what_is_there_is_told_at_once_and_what_is_not_is_missing(world):
    lease = world.lease()
    world.reserve(lease, 1)
    world.commit(lease, 1)
    assert await decided(world.wait(lease, 1, 2)) == ({key(1)}, {key(2)})


async def test_a_wait_ends_with_the_commit_and_holds_the_block(world):
    writer, reader = world.lease(), world.lease(5000)
    awaiter = world.wait(reader, 1, 2, wait_for_writer=True)
    waiting = asyncio.ensure_future(decided(awaiter))
    world.reserve(writer, 1, 2)
    world.commit(writer, 1)
    await asyncio.sleep(0)
    assert not waiting.done()
    world.commit(writer, 2)
    assert await waiting == ({key(1), key(2)}, set())
    world.store.stop_await(awaiter)
    world.pass_time(2)
    assert world.store.block_size(reader, key(1)) == SIZE
    assert world.store.stats().live_leases == 1
    assert world.store.stats().held_blocks == 2


@pytest.mark.parametrize("wait_for_writer", [False, True])
@pytest.mark.parametrize("how", ["abandon", "release", "expire"])
async def test_a_lost_writer_is_told_as_missing(world, how, wait_for_writer):
    writer, reader = world.lease(), world.lease(5000)
    world.reserve(writer, 1)
    waiting = asyncio.ensure_future(decided(world.wait(reader, 1, wait_for_writer=wait_for_writer)))
    if how == "abandon":
        world.store.abandon(writer, [key(1)])
    elif how == "release":
        world.store.release([writer])
    else:
        world.pass_time(1.0)
    assert await waiting == (set(), {key(1)})
    world.pass_time(0.5)
    assert world.store.stats().used_bytes == 0


async def test_a_wait_ends_with_its_own_lease(world):
    lease = world.lease()
    waiting = asyncio.ensure_future(decided(world.wait(lease, 1, wait_for_writer=True)))
    await asyncio.sleep(0)
    world.pass_time(1.0)
    with pytest.raises(LeaseEnded):
        await waiting
    assert world.store.stats().awaiting_calls == 0


async def test_waits_are_bounded_and_forgotten(world):
    lease = world.lease()
    awaiters = [world.wait(lease, at, wait_for_writer=True) for at in range(3)]
    with pytest.raises(Overloaded):
        world.wait(lease, 9, wait_for_writer=True)
    world.store.stop_await(awaiters.pop())
    with pytest.raises(Overloaded):
        world.wait(lease, 10, 11, 12, 13, wait_for_writer=True)
    awaiters.append(world.wait(lease, 10, 11, 12, wait_for_writer=True))
    for awaiter in awaiters:
        world.store.stop_await(awaiter)
    assert world.store.stats().awaiting_calls == 0
    world.wait(lease, *range(20, 25), wait_for_writer=True)


async def test_two_waits_for_one_key_are_both_told(world):
    lease, other = world.lease(), world.lease()
    waits = [
        asyncio.ensure_future(decided(world.wait(one, 1, wait_for_writer=True)))
        for one in (lease, other, other)
    ]
    world.reserve(lease, 1)
    world.commit(lease, 1)
    assert await asyncio.gather(*waits) == [({key(1)}, set())] * 3


def test_bytes_come_back_as_written_within_bounds(world):
    lease = world.lease()
    world.reserve(lease, 1, 2)
    world.store.write(lease, key(2), 0, b"a" * SIZE)
    world.store.write(lease, key(2), 10, b"xyz")
    with pytest.raises(BlockOutOfRange, match="4094"):
        world.store.write(lease, key(1), SIZE - 2, b"bbb")
    with pytest.raises(LeaseEnded, match="not reserved"):
        world.store.write(lease, key(3), 0, b"b")
    with pytest.raises(BlockNotFound):
        world.store.read_part(lease, key(2), 0)
    world.commit(lease, 2)
    assert world.store.read_part(lease, key(2), 0) == b"a" * 10 + b"xyz" + b"a" * (SIZE - 13)
    assert world.store.read_part(lease, key(2), SIZE - 3) == b"aaa"


def test_parts_are_at_most_a_mebibyte():
    arena = Arena(4 << 20)
    world = World(arena)
    lease = world.lease()
    size = MAX_PART_BYTES + 5
    world.store.reserve(lease, [BlockSpec(key(1), size, 16)])
    world.store.write(lease, key(1), MAX_PART_BYTES, b"12345")
    world.commit(lease, 1)
    assert len(world.store.read_part(lease, key(1), 0)) == MAX_PART_BYTES
    assert world.store.read_part(lease, key(1), MAX_PART_BYTES) == b"12345"
    arena.close()


@pytest.mark.parametrize("call", ["reserve", "write", "commit", "abandon", "wait", "read"])
def test_an_ended_lease_can_do_nothing_even_before_the_sweep(world, call):
    lease = world.lease()
    world.reserve(lease, 1, 2)
    world.commit(lease, 2)
    world.now += 1.0
    calls = {
        "reserve": lambda: world.reserve(lease, 3),
        "write": lambda: world.store.write(lease, key(1), 0, b"late"),
        "commit": lambda: world.commit(lease, 1),
        "abandon": lambda: world.store.abandon(lease, [key(1)]),
        "wait": lambda: world.wait(lease, 2),
        "read": lambda: world.store.read_part(lease, key(2), 0),
    }
    with pytest.raises(LeaseEnded):
        calls[call]()


def test_full_blocks_rest_and_the_watcher_knows(world):
    lease = world.lease()
    world.reserve(lease, 1, 2)
    world.reserve(lease, 3, num_tokens=7)
    world.commit(lease, 1, 3)
    assert world.watcher.keys == {key(1)}
    world.store.release([lease])
    world.pass_time(0.5)
    assert world.store.stats().used_bytes == SIZE
    assert world.store.prefix_length([key(1), key(2)]) == 1
    world.reserve(world.lease(), *range(10, 18))
    assert world.watcher.keys == set()


def test_a_block_of_an_unknown_geometry_does_not_rest(world):
    lease = world.lease()
    world.store.reserve(lease, [BlockSpec(key(1), SIZE - 1, 16)])
    world.commit(lease, 1)
    world.store.release([lease])
    assert world.store.stats().used_bytes == 0


@pytest.mark.parametrize(
    ("block_tokens", "block_bytes"), [(0, SIZE), (16, 0), (16, 8 * SIZE + 1), (16, 2**63)]
)
def test_an_impossible_layout_is_refused(world, block_tokens, block_bytes):
    with pytest.raises(InvalidRequest, match="kv_layout"):
        world.store.introduce(KvLayout(b"m" * 32, block_tokens, block_bytes))


def test_renew_names_the_ended_and_release_is_idempotent(world):
    lease, stale = world.lease(), Lease("nobody", world.store.epoch, "here")
    assert world.store.renew([lease, stale], 1000) == ["nobody"]
    world.store.release([lease, stale])
    world.store.release([lease])
    assert world.store.renew([lease], 1000) == [lease.lease_id]
