"""Requests that no honest client sends, and what the process shows of itself."""

import asyncio
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.kv.layout import MAX_PART_BYTES, KvLayout, Lease
from splitserve.rpc.channel import open_channel
from splitserve.v1 import common_pb2, kvstore_pb2, kvstore_pb2_grpc

LAYOUT = KvLayout(b"m" * 32, 16, 300_000)
KEY = b"k" * 32
INVALID = grpc.StatusCode.INVALID_ARGUMENT
ENDED = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def stub(shared_store):
    channel = open_channel(shared_store.address)
    yield kvstore_pb2_grpc.KvStoreServiceStub(channel)
    await channel.close()


@pytest.fixture
async def lease(stub):
    response = await stub.GrantLease(
        kvstore_pb2.GrantLeaseRequest(owner="test", ttl_ms=10_000), timeout=5
    )
    yield response.lease
    await stub.ReleaseLeases(kvstore_pb2.ReleaseLeasesRequest(leases=[response.lease]), timeout=5)


async def code_of(call):
    """The status that a call of any kind ends with."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as err:
        return err.code()
    return grpc.StatusCode.OK


def spec(key=KEY, size_bytes=4096, num_tokens=16):
    return kvstore_pb2.BlockSpec(key=key, size_bytes=size_bytes, num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Connect", kvstore_pb2.ConnectRequest()),
        ("Connect", kvstore_pb2.ConnectRequest(worker_id="w")),
        ("Connect", kvstore_pb2.ConnectRequest(worker_id="w" * 257, kv_layout=LAYOUT.to_proto())),
        ("GrantLease", kvstore_pb2.GrantLeaseRequest(ttl_ms=1000)),
        ("GrantLease", kvstore_pb2.GrantLeaseRequest(owner="o")),
        ("GrantLease", kvstore_pb2.GrantLeaseRequest(owner="o", ttl_ms=2**32 - 1)),
        ("RenewLeases", kvstore_pb2.RenewLeasesRequest(leases=[common_pb2.LeaseRef()])),
        ("ReserveBlocks", kvstore_pb2.ReserveBlocksRequest()),
        ("LookupBlocks", kvstore_pb2.LookupBlocksRequest(keys=[KEY, b"short"])),
        ("LookupBlocks", kvstore_pb2.LookupBlocksRequest(keys=[b""] * 100_000)),
    ],
)
async def test_nonsense_is_an_invalid_argument(stub, method, request_):
    assert await code_of(getattr(stub, method)(request_, timeout=5)) is INVALID


@pytest.mark.parametrize(
    "blocks",
    [
        [spec(key=b"k")],
        [spec(size_bytes=0)],
        [spec(size_bytes=2**64 - 1)],
        [spec(num_tokens=0)],
        [spec(), spec()],
    ],
)
async def test_impossible_blocks_are_an_invalid_argument(stub, lease, blocks):
    request = kvstore_pb2.ReserveBlocksRequest(lease=lease, blocks=blocks)
    assert await code_of(stub.ReserveBlocks(request, timeout=5)) is INVALID
    stats = await stub.GetStats(kvstore_pb2.GetStatsRequest(), timeout=5)
    assert stats.reserved_blocks == 0


async def test_a_lease_that_does_not_exist(stub, lease):
    other = Lease("nobody", lease.epoch, "").to_proto()
    requests = [
        stub.ReserveBlocks(kvstore_pb2.ReserveBlocksRequest(lease=other), timeout=5),
        stub.CommitBlocks(kvstore_pb2.CommitBlocksRequest(lease=other), timeout=5),
        stub.AbandonBlocks(kvstore_pb2.AbandonBlocksRequest(lease=other), timeout=5),
        stub.DropBlocks(kvstore_pb2.DropBlocksRequest(lease=other), timeout=5),
        stub.AwaitBlocks(kvstore_pb2.AwaitBlocksRequest(lease=other, keys=[KEY]), timeout=5),
        stub.ReadBlocks(kvstore_pb2.ReadBlocksRequest(lease=other, keys=[KEY]), timeout=5),
        stub.WriteBlocks([kvstore_pb2.WriteBlocksRequest(lease=other, key=KEY)], timeout=5),
    ]
    assert [await code_of(call) for call in requests] == [ENDED] * 7


async def test_blocks_that_the_lease_does_not_hold(stub, lease):
    commit = kvstore_pb2.BlockCommit(key=KEY, digest=b"d" * 17)
    read = kvstore_pb2.ReadBlocksRequest(lease=lease, keys=[KEY])
    assert await code_of(stub.ReadBlocks(read, timeout=5)) is grpc.StatusCode.NOT_FOUND
    request = kvstore_pb2.CommitBlocksRequest(lease=lease, blocks=[commit])
    assert await code_of(stub.CommitBlocks(request, timeout=5)) is ENDED
    damaged = [kvstore_pb2.DamagedBlock(key=KEY, digest=b"d" * 17)]
    drop = kvstore_pb2.DropBlocksRequest(lease=lease, blocks=damaged)
    assert (await stub.DropBlocks(drop, timeout=5)).num_dropped == 0
    drop.blocks[0].digest = b"short"
    assert await code_of(stub.DropBlocks(drop, timeout=5)) is INVALID
    commit.digest = b"short"
    request = kvstore_pb2.CommitBlocksRequest(lease=lease, blocks=[commit])
    assert await code_of(stub.CommitBlocks(request, timeout=5)) is INVALID


async def test_parts_that_do_not_fit(stub, lease):
    reserve = kvstore_pb2.ReserveBlocksRequest(lease=lease, blocks=[spec(num_tokens=3)])
    await stub.ReserveBlocks(reserve, timeout=5)

    async def write(offset, data):
        part = kvstore_pb2.WriteBlocksRequest(lease=lease, key=KEY, offset_bytes=offset, data=data)
        return await code_of(stub.WriteBlocks([part], timeout=5))

    assert await write(4095, b"x") is grpc.StatusCode.OK
    assert await write(4095, b"xx") is grpc.StatusCode.OUT_OF_RANGE
    assert await write(2**64 - 1, b"x") is grpc.StatusCode.OUT_OF_RANGE
    assert await write(0, b"x" * (MAX_PART_BYTES + 1)) is INVALID


async def test_an_overlong_message_is_refused_and_the_store_lives(stub):
    request = kvstore_pb2.LookupBlocksRequest(keys=[KEY] * 200_000)
    assert await code_of(stub.LookupBlocks(request, timeout=5)) in (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        INVALID,
    )


@pytest.mark.parametrize("holder", ["", "x" * 300, None])
async def test_a_publisher_must_say_who_it_is(stub, shared_store, holder):
    name = shared_store.address if holder is None else holder
    message = kvstore_pb2.PublishBlocksRequest(holder_id=name, added_keys=[KEY])
    assert await code_of(stub.PublishBlocks([message], timeout=5)) is INVALID


async def test_an_empty_stream_is_no_error(stub):
    assert await code_of(stub.PublishBlocks([], timeout=5)) is grpc.StatusCode.OK
    assert await code_of(stub.WriteBlocks([], timeout=5)) is grpc.StatusCode.OK


METHODS = {
    "Connect": False,
    "GrantLease": False,
    "RenewLeases": False,
    "ReserveBlocks": False,
    "WriteBlocks": True,
    "CommitBlocks": False,
    "AbandonBlocks": False,
    "DropBlocks": False,
    "LookupBlocks": False,
    "PublishBlocks": True,
}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(method=st.sampled_from(sorted(METHODS)), payload=st.binary(max_size=200))
async def test_random_bytes_never_end_as_unknown_or_hang(shared_store, method, payload):
    channel = open_channel(shared_store.address)
    path = f"/splitserve.v1.KvStoreService/{method}"
    if METHODS[method]:
        call = channel.stream_unary(path)([payload], timeout=5)
    else:
        call = channel.unary_unary(path)(payload, timeout=5)
    code = await code_of(call)
    await channel.close()
    assert code in (
        grpc.StatusCode.OK,
        INVALID,
        ENDED,
        grpc.StatusCode.INTERNAL,  # what gRPC itself answers to bytes that are no message
    )


async def test_silent_and_rude_callers_of_the_handle_socket(stub, connect, shared_store):
    request = kvstore_pb2.ConnectRequest(worker_id="w", kv_layout=LAYOUT.to_proto())
    name = (await stub.Connect(request, timeout=5)).handle_socket
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect("\0" + name[1:])
    assert (await connect(shared_store, "shm")).transport_name == "shm"


async def test_metrics_and_probes(shared_store, connect, content):
    client = await connect(shared_store)
    lease = await client.grant_lease("router", 5000)
    await content(1).hand_in(client, lease)

    def get(path):
        url = f"http://127.0.0.1:{shared_store.metrics_port}{path}"
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()

    async with asyncio.timeout(5):
        while True:
            _, text = await asyncio.to_thread(get, "/metrics")
            held = re.search(r'splitserve_kvstore_blocks\{state="held"\} (\S+)', text)
            if held and float(held[1]) >= 1:
                break
    assert "splitserve_kvstore_arena_bytes 8.388608e+06" in text
    assert (await asyncio.to_thread(get, "/readyz"))[0] == 200
    await client.release([lease])


@pytest.mark.parametrize(
    ("flag", "value", "names"),
    [
        ("--arena-bytes", "100", "ARENA_BYTES"),
        ("--arena-bytes", str(2**46), "ARENA_BYTES"),
        ("--redis-url", "http://nowhere", "REDIS_URL"),
        ("--handle-socket", "/nonexistent/dir/socket", "HANDLE_SOCKET"),
    ],
)
def test_a_bad_setting_is_named_and_ends_the_process(flag, value, names):
    own = ["--port", "0", "--metrics-port", "0"]
    ended = subprocess.run(
        [sys.executable, "-m", "services.kvstore", *own, flag, value],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert names in ended.stderr
    assert "Traceback" not in ended.stderr


def test_neither_service_nor_client_imports_torch():
    code = (
        "import services.kvstore.__main__, splitserve.kv.client, splitserve.kv.lease_keeper, sys;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
