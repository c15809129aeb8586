"""A real store process, clients of both transports, and blocks of known content."""

import asyncio
import contextlib
import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from splitserve.kv.client import KvStoreClient
from splitserve.kv.codec import block_digest
from splitserve.kv.layout import BlockSpec, KvLayout

from ...suite import free_port

ROOT = Path(__file__).parents[3]
BLOCK_BYTES = 300_000
LAYOUT = KvLayout(b"m" * 32, 16, BLOCK_BYTES)
ARENA_BYTES = 8 << 20


class StoreProcess:
    """`python -m services.kvstore`, ready once `start` returns."""

    def __init__(self, *flags):
        self.port, self.metrics_port = free_port(), free_port()
        self.flags = flags
        self.process = None
        self.log = []

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        own = ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        sizes = ["--arena-bytes", str(ARENA_BYTES)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.kvstore", *own, *sizes, *self.flags],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on" in line:
                break
        else:
            raise AssertionError("the store did not start: " + "".join(self.log))
        threading.Thread(target=self._drain, args=[self.process.stderr], daemon=True).start()
        return self

    def _drain(self, stderr):
        with stderr:
            self.log.extend(stderr)

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
                raise


@pytest.fixture(scope="session")
def shared_store():
    """One store for all tests that do it no harm and let nothing stay held."""
    store = StoreProcess()
    try:
        yield store.start()
    finally:
        store.stop()


@pytest.fixture
def own_store(start_store):
    """A store of the test's own, to be killed and started again."""
    return start_store()


@pytest.fixture
def start_store():
    """Starts stores of the test's own with further flags."""
    with contextlib.ExitStack() as stack:

        def start(*flags):
            store = StoreProcess(*flags)
            stack.callback(store.stop)
            return store.start()

        yield start


@pytest.fixture
async def connect():
    """Makes clients that are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(store, transport="auto", worker_id=None):
            name = worker_id or f"worker-{random.getrandbits(64):x}"
            client = await KvStoreClient.connect(
                store.address, worker_id=name, layout=LAYOUT, transport=transport
            )
            stack.push_async_callback(client.close)
            return client

        yield make


class Content:
    """Blocks named by anything, with bytes that depend on the name alone."""

    def __init__(self, *names, size_bytes=BLOCK_BYTES, num_tokens=16):
        self.num_tokens = num_tokens
        self.data = {
            hashlib.sha256(repr(name).encode()).digest(): random.Random(repr(name)).randbytes(
                size_bytes
            )
            for name in names
        }

    @property
    def keys(self):
        return list(self.data)

    @property
    def specs(self):
        return [BlockSpec(key, len(data), self.num_tokens) for key, data in self.data.items()]

    def digest(self, key):
        return block_digest(key, self.num_tokens, LAYOUT.fingerprint, self.data[key])

    async def hand_in(self, client, lease):
        """Reserves, writes and commits; all blocks must be new."""
        reservations = await client.reserve(lease, self.specs)
        assert all(reservation.must_write for reservation in reservations)
        for (key, data), reservation in zip(self.data.items(), reservations, strict=True):
            half = len(data) // 2
            view = memoryview(data)
            await client.write(lease, key, reservation, half, view[half:])
            await client.write(lease, key, reservation, 0, view[:half])
        await client.commit(lease, [(key, self.digest(key)) for key in self.data])

    async def take_out(self, client, lease):
        """Awaits and reads all blocks and compares them."""
        blocks, missing = await await_all(client, lease, self.keys)
        assert missing == []
        for block in blocks:
            out = bytearray(block.size_bytes)
            await client.read(lease, block, memoryview(out))
            assert bytes(out) == self.data[block.key]
        assert {block.key for block in blocks} == set(self.keys)
        return blocks


async def await_all(client, lease, keys, wait_for_writer=False):
    ready, missing = [], []
    async with aclosing(client.await_blocks(lease, keys, wait_for_writer, timeout_s=10)) as batches:
        async for some_ready, some_missing in batches:
            ready += some_ready
            missing += some_missing
    return ready, missing


async def eventually(condition, within_s=5.0):
    """Waits until the coroutine function answers true; how long it took, in seconds."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while not await condition():  # noqa: ASYNC110 -- the condition is in another process
            await asyncio.sleep(0.01)
    return time.monotonic() - began


@pytest.fixture
def content():
    """Content whose names are of this test alone."""
    salt = random.getrandbits(64)
    return lambda *names, **kwargs: Content(*((salt, name) for name in names), **kwargs)


@pytest.fixture
def until():
    return eventually


@pytest.fixture
def awaited():
    return await_all
