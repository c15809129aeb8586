"""The store is killed or stopped in the middle of everything: nothing hangs, and it works again."""

import asyncio
import os
import signal
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from splitserve.errors import DeadlineExceeded, LeaseEnded, SplitserveError, Unavailable
from splitserve.kv.control import StoreControl
from splitserve.kv.lease_keeper import LeaseKeeper

TRANSPORTS = ["shm", "grpc"]
NOTICED_S = 2.5


async def ends_in_time(awaitable, *errors):
    """The awaitable must raise one of `errors` soon."""
    began = time.monotonic()
    with pytest.raises(errors):
        async with asyncio.timeout(10):
            await awaitable
    assert time.monotonic() - began < NOTICED_S


async def works(client, content, owner="router"):
    """A whole handover under a fresh lease, once the store is reachable."""

    async def granted():
        try:
            leases.append(await client.grant_lease(owner, 5000))
        except Unavailable:
            return False
        return True

    leases = []
    async with asyncio.timeout(10):
        while not await granted():  # noqa: ASYNC110 -- the store is another process
            await asyncio.sleep(0.02)
    blocks = content(time.monotonic())
    await blocks.hand_in(client, leases[0])
    await blocks.take_out(client, leases[0])
    return leases[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_killed_during_await(own_store, connect, content, transport):
    client = await connect(own_store, transport)
    lease = await works(client, content)
    present, absent = content("present"), content("absent")
    await present.hand_in(client, lease)
    keys = present.keys + absent.keys
    async with aclosing(client.await_blocks(lease, keys, True, timeout_s=60)) as batches:
        assert [block.key for block in (await anext(batches))[0]] == present.keys
        own_store.kill()
        await ends_in_time(anext(batches), Unavailable)
    own_store.start()
    await works(client, content)
    with pytest.raises(LeaseEnded):
        await client.reserve(lease, absent.specs)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_killed_during_writes(own_store, connect, content, transport):
    client = await connect(own_store, transport)
    lease = await client.grant_lease("router", 60_000)
    blocks = content("big", size_bytes=4 << 20)
    (key,) = blocks.keys
    (reservation,) = await client.reserve(lease, blocks.specs)
    began = asyncio.Event()

    async def write_on():
        while True:
            await client.write(lease, key, reservation, 0, memoryview(blocks.data[key]))
            began.set()

    writing = asyncio.ensure_future(write_on())
    await asyncio.wait_for(began.wait(), 10)
    own_store.kill()
    await ends_in_time(writing, Unavailable)
    with pytest.raises(Unavailable):
        await client.commit(lease, [(key, blocks.digest(key))])
    own_store.start()
    epoch = (await works(client, content)).epoch
    assert client.epoch == epoch != lease.epoch
    with pytest.raises(LeaseEnded, match="earlier run"):
        await client.write(lease, key, reservation, 0, memoryview(b"late"))


async def test_killed_during_reads_over_grpc(own_store, connect, content, awaited):
    client = await connect(own_store, "grpc")
    lease = await client.grant_lease("router", 60_000)
    blocks = content("big", size_bytes=4 << 20)
    await blocks.hand_in(client, lease)
    (block,), _ = await awaited(client, lease, blocks.keys)
    out, began = memoryview(bytearray(block.size_bytes)), asyncio.Event()

    async def read_on():
        while True:
            await client.read(lease, block, out)
            began.set()

    reading = asyncio.ensure_future(read_on())
    await asyncio.wait_for(began.wait(), 10)
    own_store.kill()
    await ends_in_time(reading, Unavailable)
    own_store.start()
    await works(client, content)


async def test_what_was_mapped_can_be_read_after_the_store_died(
    own_store, connect, content, awaited
):
    client = await connect(own_store, "shm")
    lease = await client.grant_lease("router", 60_000)
    blocks = content(1)
    await blocks.hand_in(client, lease)
    (block,), _ = await awaited(client, lease, blocks.keys)
    own_store.kill()
    out = bytearray(block.size_bytes)
    await client.read(lease, block, memoryview(out))
    assert bytes(out) == blocks.data[block.key]
    own_store.start()
    await works(client, content)
    with pytest.raises(LeaseEnded, match="earlier run"):
        await client.read(lease, block, memoryview(out))


async def test_a_store_that_stopped_answering_is_noticed(own_store, connect, content):
    client = await connect(own_store, "grpc")
    lease = await client.grant_lease("router", 60_000)
    present, fresh = content("present"), content("fresh")
    await present.hand_in(client, lease)
    (block,) = await present.take_out(client, lease)
    (reservation,) = await client.reserve(lease, fresh.specs)
    (key,) = fresh.keys

    async def first_batch():
        async with aclosing(client.await_blocks(lease, [key], True, timeout_s=60)) as batches:
            await anext(batches)

    own_store.signal(signal.SIGSTOP)
    calls = [
        client.reserve(lease, fresh.specs),
        first_batch(),
        client.read(lease, block, memoryview(bytearray(block.size_bytes))),
        client.write(lease, key, reservation, 0, memoryview(fresh.data[key])),
        client.commit(lease, [(key, fresh.digest(key))]),
        client.grant_lease("router", 1000),
    ]
    await asyncio.gather(*(ends_in_time(call, Unavailable, DeadlineExceeded) for call in calls))
    own_store.signal(signal.SIGCONT)
    await works(client, content)


async def test_pools_are_published_again(own_store, connect, until):
    client = await connect(own_store, worker_id="pool")
    keys = [bytes([at]) * 32 for at in range(3)]
    client.publish(added=keys)

    async def known():
        try:
            return await client.lookup(keys) == {"pool": 3}
        except Unavailable:
            return False

    async def out_of_reach():
        return not client.reachable

    await until(known)
    assert client.reachable
    own_store.kill()
    await until(out_of_reach)
    own_store.start()
    await until(known, within_s=10)
    assert client.reachable


async def test_a_killed_worker_is_forgotten_with_its_reservations(own_store, connect, until):
    observer = await connect(own_store)
    code = """
import asyncio, sys
from splitserve.kv.client import KvStoreClient
from splitserve.kv.layout import BlockSpec, KvLayout

async def main(address):
    layout = KvLayout(b"m" * 32, 16, 300_000)
    client = await KvStoreClient.connect(address, worker_id="doomed", layout=layout)
    client.publish(added=[b"p" * 32])
    lease = await client.grant_lease("doomed", 500)
    await client.reserve(lease, [BlockSpec(b"r" * 32, 300_000, 16)])
    await asyncio.sleep(60)

asyncio.run(main(sys.argv[1]))
"""

    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, own_store.address, cwd=Path(__file__).parents[3]
    )

    async def arrived():
        stats = await observer.stats()
        return stats.reserved_blocks == 1 and await observer.lookup([b"p" * 32]) == {"doomed": 1}

    await until(arrived, within_s=20)
    worker.kill()

    async def forgotten():
        stats = await observer.stats()
        return stats.used_bytes == 0 and stats.directory_entries == 0

    assert await until(forgotten) < 0.5 + 1.0
    await worker.wait()


def traces(store):
    """What of a store can be seen in the file system or among the sockets."""
    epoch_free = [name for name in os.listdir("/dev/shm") if "splitserve" in name]
    sockets = Path("/proc/net/unix").read_text()
    return epoch_free, sockets.count("@splitserve-kv-")


async def test_kill_leaves_nothing_behind(start_store, connect, content):
    before = traces(None)
    store = start_store()
    client = await connect(store, "shm")
    await works(client, content)
    assert traces(store)[1] == before[1] + 1
    store.kill()
    assert traces(store) == before


async def test_sigterm_is_unready_then_drained_then_zero(start_store, connect, content):
    store = start_store("--drain-grace-s", "0.3")
    client = await connect(store)
    client.publish(added=[b"p" * 32])
    lease = await works(client, content)
    async with aclosing(client.await_blocks(lease, [b"k" * 32], True, timeout_s=60)) as batches:
        waiting = asyncio.ensure_future(anext(batches))
        store.signal(signal.SIGTERM)
        with pytest.raises(SplitserveError):
            await asyncio.wait_for(waiting, 5)
    assert await asyncio.to_thread(store.process.wait, 10) == 0


async def test_the_keeper_renews_and_releases_in_batches(own_store, until):
    control = StoreControl(own_store.address)
    keeper = LeaseKeeper(control, "router", ttl_ms=300)
    keeper.start()
    leases = await asyncio.gather(*(keeper.grant() for _ in range(50)))
    await asyncio.sleep(0.9)  # three times to live: only renewal can have kept them
    assert (await control.stats()).live_leases == 50
    for lease in leases[:49]:
        keeper.release(lease)
        keeper.release(lease)

    async def one_is_left():
        return (await control.stats()).live_leases == 1

    await until(one_is_left)
    keeper.check(leases[49])
    with pytest.raises(LeaseEnded):
        keeper.check(leases[0])
    await keeper.close()
    assert (await control.stats()).live_leases == 0
    await control.close()


@pytest.mark.parametrize("restart", [False, True])
async def test_the_keeper_tells_of_lost_leases(own_store, restart):
    control = StoreControl(own_store.address)
    keeper = LeaseKeeper(control, "router", ttl_ms=900)
    keeper.start()
    lease = await keeper.grant()
    lost = asyncio.ensure_future(keeper.wait_lost(lease))
    own_store.kill()
    if restart:
        await asyncio.to_thread(own_store.start)
    await asyncio.wait_for(lost, 5)
    with pytest.raises(LeaseEnded):
        keeper.check(lease)
    await keeper.close()
    await control.close()


async def test_an_idle_worker_does_not_hold_up_sigterm(own_store, connect, until):
    client = await connect(own_store, worker_id="pool")
    client.publish(added=[b"p" * 32])

    async def known():
        return (await client.stats()).directory_entries == 1

    await until(known)
    own_store.signal(signal.SIGTERM)
    assert await asyncio.to_thread(own_store.process.wait, 5) == 0
