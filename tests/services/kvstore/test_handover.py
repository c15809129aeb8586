"""Blocks go through a real store, over each transport and across them."""

import asyncio
import hashlib
import os
import sys
import time

import pytest

from splitserve.errors import (
    BlockCorrupt,
    BlockOutOfRange,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
    Unavailable,
)
from splitserve.kv.client import KvStoreClient
from splitserve.kv.control import StoreControl
from splitserve.kv.layout import KvLayout, Lease, Reservation, ReservationState
from splitserve.kv.transports.handle import receive_handle
from splitserve.v1 import kvstore_pb2

LAYOUT = KvLayout(b"m" * 32, 16, 300_000)
TRANSPORTS = ["shm", "grpc"]
WRITE, PRESENT, BEING_WRITTEN = ReservationState


@pytest.mark.parametrize("writer_by", TRANSPORTS)
@pytest.mark.parametrize("reader_by", TRANSPORTS)
async def test_bytes_arrive_by_any_pair_of_transports(
    shared_store, connect, content, writer_by, reader_by
):
    writer = await connect(shared_store, writer_by)
    reader = await connect(shared_store, reader_by)
    lease = await writer.grant_lease("router", 5000)
    blocks, tail = content(1, 2, 3), content("tail", size_bytes=1001, num_tokens=3)
    reading = asyncio.ensure_future(reader_takes_all(reader, lease, [blocks, tail]))
    await blocks.hand_in(writer, lease)
    await tail.hand_in(writer, lease)
    await reading
    await writer.release([lease])
    lengths = await reader.lookup(blocks.keys + tail.keys)
    assert lengths[shared_store.address] == 3  # full blocks rest, the tail is gone


async def reader_takes_all(reader, lease, contents):
    for content in contents:
        async for ready, missing in reader.await_blocks(lease, content.keys, True, timeout_s=10):
            assert missing == []
            for block in ready:
                out = bytearray(block.size_bytes)
                await reader.read(lease, block, memoryview(out))
                assert bytes(out) == content.data[block.key]


async def test_auto_takes_shared_memory_on_this_node(shared_store, connect):
    client = await connect(shared_store)
    assert client.transport_name == "shm"
    assert client.arena.nbytes == 8 << 20
    assert client.address == shared_store.address
    by_grpc = await connect(shared_store, "grpc")
    assert (by_grpc.transport_name, by_grpc.arena) == ("grpc", None)
    assert by_grpc.epoch == client.epoch


async def test_a_block_larger_than_a_message(shared_store, connect, content):
    for transport in TRANSPORTS:
        client = await connect(shared_store, transport)
        lease = await client.grant_lease("router", 5000)
        big = content(transport, size_bytes=(3 << 20) + 17)
        await big.hand_in(client, lease)
        await big.take_out(client, lease)
        await client.release([lease])


async def test_a_second_request_finds_what_rests(shared_store, connect, content):
    client = await connect(shared_store)
    first, second = [await client.grant_lease("router", 5000) for _ in range(2)]
    blocks = content(1, 2)
    await blocks.hand_in(client, first)
    await client.release([first])
    answers = await client.reserve(second, blocks.specs)
    assert [answer.state for answer in answers] == [PRESENT, PRESENT]
    await blocks.take_out(client, second)
    await client.release([second])


async def test_two_writers_of_one_key(shared_store, connect, content, awaited):
    one, two = await connect(shared_store), await connect(shared_store, "grpc")
    first, second = [await one.grant_lease("router", 5000) for _ in range(2)]
    blocks = content(1, 2)
    await one.reserve(first, blocks.specs)
    answers = await two.reserve(second, blocks.specs)
    assert [answer.state for answer in answers] == [BEING_WRITTEN, BEING_WRITTEN]
    with pytest.raises(InvalidRequest, match="not this worker's"):
        await two.write(second, blocks.keys[0], answers[0], 0, memoryview(b"x"))
    waiting = asyncio.ensure_future(awaited(two, second, blocks.keys))
    await one.abandon(first, blocks.keys)
    ready, missing = await waiting
    assert (ready, set(missing)) == ([], set(blocks.keys))
    await blocks.hand_in(two, second)
    await one.release([first, second])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_one_changed_byte_in_the_arena_is_found(
    shared_store, connect, content, awaited, transport
):
    client = await connect(shared_store, transport)
    vandal = await connect(shared_store, "shm")
    lease = await client.grant_lease("router", 5000)
    blocks = content(1)
    await blocks.hand_in(client, lease)
    (block,), _ = await awaited(client, lease, blocks.keys)
    out = memoryview(bytearray(block.size_bytes))
    await client.read(lease, block, out)
    vandal.arena[block.arena_offset + 1234] ^= 1
    assert bytes(out) == blocks.data[block.key]  # the copy was checked, and is not the arena
    with pytest.raises(BlockCorrupt, match="recompute"):
        await client.read(lease, block, out)
    await client.release([lease])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_block_damaged_at_rest_is_healed_by_the_next_request(
    own_store, connect, content, awaited, transport
):
    client, vandal = await connect(own_store, transport), await connect(own_store, "shm")
    writer, first, second = [await client.grant_lease("router", 5000) for _ in range(3)]
    blocks = content(1)
    await blocks.hand_in(client, writer)
    await client.release([writer])
    (block,), _ = await awaited(client, first, blocks.keys)
    vandal.arena[block.arena_offset] ^= 1
    with pytest.raises(BlockCorrupt):
        await client.read(first, block, memoryview(bytearray(block.size_bytes)))
    assert await awaited(client, first, blocks.keys) == ([], blocks.keys)
    assert await client.lookup(blocks.keys) == {}
    await blocks.hand_in(client, second)
    (again,) = await blocks.take_out(client, second)
    assert again.arena_offset != block.arena_offset, "the first reader may still be copying"
    await client.release([first, second])
    assert (await client.stats()).used_bytes == -(-block.size_bytes // 4096) * 4096


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_content_of_another_key_is_found(shared_store, connect, content, awaited, transport):
    client = await connect(shared_store, transport)
    lease = await client.grant_lease("router", 5000)
    right, wrong = content("right"), content("wrong")
    (reservation,) = await client.reserve(lease, right.specs)
    key, (other,) = right.keys[0], wrong.keys
    await client.write(lease, key, reservation, 0, memoryview(wrong.data[other]))
    await client.commit(lease, [(key, wrong.digest(other))])
    (block,), _ = await awaited(client, lease, [key])
    with pytest.raises(BlockCorrupt):
        await client.read(lease, block, memoryview(bytearray(block.size_bytes)))
    await client.release([lease])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_writer_whose_lease_ran_out_is_stopped(
    own_store, connect, content, awaited, until, transport
):
    client = await connect(own_store, transport)
    mine, other = await client.grant_lease("w", 300), await client.grant_lease("r", 5000)
    blocks = content(1)
    (reservation,) = await client.reserve(mine, blocks.specs)
    began = time.monotonic()
    ready, missing = await awaited(client, other, blocks.keys)
    assert (ready, missing) == ([], blocks.keys)
    assert 0.25 < time.monotonic() - began < 0.8
    with pytest.raises(LeaseEnded):
        await client.write(mine, blocks.keys[0], reservation, 0, memoryview(b"late"))
    with pytest.raises(LeaseEnded):
        await client.commit(mine, [(blocks.keys[0], b"d" * 17)])

    async def freed():
        return (await client.stats()).used_bytes == 0

    await until(freed)
    assert time.monotonic() - began < 0.3 + 1.0  # nothing outlives its lease by a second
    await client.release([other])


async def test_renewal_keeps_a_lease_and_names_the_ended(shared_store, connect, until):
    client = await connect(shared_store)
    kept, left = await client.grant_lease("r", 400), await client.grant_lease("r", 400)
    assert await client.renew([kept], 5000) == []

    async def ended():
        return await client.renew([kept, left], 1) == [left.lease_id]

    assert await until(ended) > 0.2
    await client.release([kept, left])
    assert set(await client.renew([kept], 1)) == {kept.lease_id}


async def test_space_is_made_by_evicting_and_refused_when_held(own_store, connect, content):
    client = await connect(own_store)
    old, new = [await client.grant_lease("router", 20_000) for _ in range(2)]
    first, rest = content(*range(10)), content(*range(100, 126))
    await first.hand_in(client, old)
    with pytest.raises(Overloaded) as refused:
        await client.reserve(new, rest.specs)
    assert refused.value.retry_after_s == pytest.approx(0.5)
    assert (await client.stats()).committed_blocks == 10
    await client.release([old])
    await rest.hand_in(client, new)
    lengths = await client.lookup(first.keys)
    assert 0 < lengths[own_store.address] < 10  # the tail of the prompt went first
    await rest.take_out(client, new)


async def test_bounds_are_checked_before_anything_is_touched(shared_store, connect, content):
    for transport in TRANSPORTS:
        client = await connect(shared_store, transport)
        lease = await client.grant_lease("router", 5000)
        blocks = content(transport)
        (reservation,) = await client.reserve(lease, blocks.specs)
        (key,) = blocks.keys
        for offset in (-1, 299_999, 2**40):
            with pytest.raises(BlockOutOfRange):
                await client.write(lease, key, reservation, offset, memoryview(b"ab"))
        far = Reservation(WRITE, (8 << 20) - 1, 10)
        with pytest.raises((BlockOutOfRange, LeaseEnded)):
            await client.write(lease, b"x" * 32, far, 0, memoryview(b"0123456789"))
        await client.release([lease])


async def test_out_must_be_writable_and_of_the_block_s_size(
    shared_store, connect, content, awaited
):
    client = await connect(shared_store)
    lease = await client.grant_lease("router", 5000)
    blocks = content(1)
    await blocks.hand_in(client, lease)
    (block,), _ = await awaited(client, lease, blocks.keys)
    for out in (bytearray(block.size_bytes - 1), bytes(block.size_bytes)):
        with pytest.raises(InvalidRequest, match="writable"):
            await client.read(lease, block, memoryview(out))
    await client.release([lease])


async def test_a_lease_of_an_unknown_run_or_store_is_ended(shared_store, connect, content):
    client = await connect(shared_store)
    lease = await client.grant_lease("router", 5000)
    blocks = content(1)
    for bad in (
        Lease(lease.lease_id, lease.epoch - 1, lease.store_address),
        Lease("0" * 32, lease.epoch, lease.store_address),
    ):
        with pytest.raises(LeaseEnded):
            await client.reserve(bad, blocks.specs)
        with pytest.raises(LeaseEnded):
            async for _ in client.await_blocks(bad, blocks.keys, True):
                pass
    await client.release([lease])


async def test_pools_are_found_and_forgotten(shared_store, connect, until):
    keys = [hashlib.sha256(bytes([at])).digest() for at in range(4)]
    one = await connect(shared_store, worker_id="pool-one")
    two = await connect(shared_store, worker_id="pool-two")
    one.publish(added=keys)
    two.publish(added=keys[:3], removed=[])
    two.publish(removed=keys[2:3])

    def holders_are(expected):
        async def check():
            return await one.lookup(keys) == expected

        return check

    await until(holders_are({"pool-one": 4, "pool-two": 2}))
    await two.close()
    await until(holders_are({"pool-one": 4}))
    one.publish(removed=keys[:1])
    await until(holders_are({}))


async def test_a_full_directory_costs_nobody_the_shared_memory(
    start_store, connect, content, until
):
    store = start_store("--max-directory-entries", "2")
    client = await connect(store, "shm", worker_id="pool")
    keys = [bytes([at]) * 32 for at in range(5)]
    client.publish(added=keys)

    async def full():
        return (await client.stats()).directory_entries == 2

    await until(full)
    client.publish(removed=keys)  # on the same stream, which has not ended
    client.publish(added=keys[:1])

    async def heard():
        return await client.lookup(keys) == {"pool": 1}

    await until(heard)
    assert sum("directory is full" in line for line in store.log) == 1
    assert client.reachable
    assert client.arena.nbytes == 8 << 20


async def test_a_refused_publisher_keeps_the_shared_memory(shared_store, connect, until, caplog):
    client = await connect(shared_store, "shm", worker_id=shared_store.address)

    async def refused():
        return "is this store's own address" in caplog.text

    await until(refused)
    assert client.reachable
    assert client.arena.nbytes == 8 << 20


async def test_a_layout_that_does_not_fit_is_refused(shared_store):
    layout = KvLayout(b"m" * 32, 16, (8 << 20) + 1)
    with pytest.raises(InvalidRequest, match="block_bytes"):
        await KvStoreClient.connect(shared_store.address, worker_id="w", layout=layout)


async def test_shared_memory_can_be_switched_off(start_store, connect, content):
    store = start_store("--no-shared-memory")
    with pytest.raises(Unavailable, match="switched off"):
        await connect(store, "shm")
    client = await connect(store)
    assert client.transport_name == "grpc"
    blocks = content(1)
    lease = await client.grant_lease("router", 5000)
    await blocks.hand_in(client, lease)
    await blocks.take_out(client, lease)


async def test_handle_socket_by_path(start_store, connect, tmp_path):
    path = tmp_path / "handle.sock"
    store = start_store("--handle-socket", str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert (await connect(store, "shm")).transport_name == "shm"
    store.kill()
    store.start()  # over the socket that the killed one left
    assert (await connect(store, "shm")).transport_name == "shm"
    store.stop()
    assert not path.exists()


async def test_the_arena_is_refused_to_another_user(shared_store, connect):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    name = await handle_socket(shared_store)
    code = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534);"
        "peer = socket.socket(socket.AF_UNIX); peer.connect(chr(0) + sys.argv[1][1:]);"
        "print(socket.recv_fds(peer, 100, 1)[:2])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, name, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await asyncio.wait_for(process.communicate(), 20)
    assert answer.decode().strip() == "(b'', [])"
    handle = receive_handle(name)
    assert handle.arena_bytes == 8 << 20
    with pytest.raises(PermissionError):
        os.ftruncate(handle.fd, 0)  # sealed: nobody can pull the memory from under the others
    os.close(handle.fd)


async def handle_socket(store):
    control = StoreControl(store.address)
    request = kvstore_pb2.ConnectRequest(worker_id="w", kv_layout=LAYOUT.to_proto())
    response = await control.stub.Connect(request, timeout=5)
    await control.close()
    return response.handle_socket
