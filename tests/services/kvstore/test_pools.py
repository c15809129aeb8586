"""Blocks in workers' pools through a real store process, with pools in memory files."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from dataclasses import replace

import pytest

from splitserve.engine.fake_shared import SharedFakeEngine
from splitserve.errors import InvalidRequest, LeaseEnded
from splitserve.kv.client import KvStoreClient
from splitserve.kv.layout import BlockSpec, KvLayout
from splitserve.kv.page_mover import PagePart
from splitserve.worker.pages import EnginePages


class Worker:
    """A client with a pool; it keeps what it shares until it is told that it is gone."""

    def __init__(self, engine, client):
        self.engine, self.client = engine, client
        self.gone_keys, self.wanted_keys, self.is_lost = [], [], False

    def gone(self, keys):
        self.gone_keys += keys

    def wanted(self, keys):
        self.wanted_keys += keys

    def lost(self):
        self.is_lost = True

    def fill(self, page, seed):
        content = random.Random(seed).randbytes(self.engine.spec.block_bytes)
        self.engine.insert_page(page, memoryview(content))
        return content

    def content(self, page):
        out = bytearray(self.engine.spec.block_bytes)
        self.engine.export_page(page, 0, self.engine.spec.num_layers, memoryview(out))
        return bytes(out)

    def specs(self, keys):
        return [BlockSpec(key, self.engine.spec.block_bytes, 16) for key in keys]

    async def share(self, lease, pages):
        """Fills and shares a page for each key."""
        share = self.client.open_share(self)
        answers = await self.client.reserve(lease, self.specs(pages), share)
        assert all(answer.in_pool for answer in answers)
        places = [(key, 16, page) for key, page in pages.items()]
        await self.share_pages(lease, share, places)

    async def share_pages(self, lease, share, places):
        """Seals and commits (key, num_tokens, page) blocks."""
        digests = await self.client.seal_pages(places, staying=True)
        sealed = [(key, page, d) for (key, _, page), d in zip(places, digests, strict=True)]
        await self.client.share_pages(lease, share, sealed)

    async def write(self, lease, key, page):
        """Writes a shared block to the arena after all."""
        (answer,) = await self.client.reserve(lease, self.specs([key]))
        assert answer.must_write
        assert not answer.in_pool
        spec = self.engine.spec
        await self.client.put_pages(lease, [PagePart(key, answer, page, 0, spec.num_layers, None)])
        (digest,) = await self.client.seal_pages([(key, 16, page)], staying=False)
        await self.client.commit(lease, [(key, digest)])


class BogusEngine(SharedFakeEngine):
    """Its handle leads nowhere."""

    def pages_handle(self):
        return struct.pack("<QQQ", 2**22 + 1, 0, self.spec.block_bytes)


@pytest.fixture
async def worker(shared_store):
    """Makes workers of the shared store, or of another."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(kind=SharedFakeEngine, store=shared_store, keeps_blocks=True):
            engine = kind(num_pages=8)
            stack.callback(engine.close)
            spec = engine.spec
            client = await KvStoreClient.connect(
                store.address,
                worker_id=f"worker-{random.getrandbits(64):x}",
                layout=KvLayout(spec.fingerprint, spec.block_tokens, spec.block_bytes),
                transport="device",
                pages=EnginePages(engine),
                keeps_blocks=keeps_blocks,
            )
            stack.push_async_callback(client.close)
            made = Worker(engine, client)
            while keeps_blocks and client.open_share(made) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            return made

        yield make


def keys_of(count):
    return [random.randbytes(32) for _ in range(count)]


async def test_a_block_is_read_in_its_page_and_gone_when_let_go(worker, awaited, until):
    writer, reader = await worker(), await worker(keeps_blocks=False)
    keys = keys_of(2)
    lease = await writer.client.grant_lease("test", 10_000)
    contents = [writer.fill(page, page) for page in (3, 6)]
    await writer.share(lease, dict(zip(keys, (3, 6), strict=True)))
    blocks, missing = await awaited(reader.client, lease, keys)
    assert missing == []
    blocks.sort(key=lambda block: keys.index(block.key))
    assert [block.pool_page.page for block in blocks] == [3, 6]
    assert await reader.client.take_pages(lease, blocks, [[0, 1], [2]]) == [True, True]
    assert [reader.content(page) for page in (0, 1, 2)] == [contents[0], contents[0], contents[1]]
    await reader.client.let_go(lease, keys[:1])

    async def told():
        return writer.gone_keys == keys[:1]

    await until(told)
    await writer.client.release([lease])

    async def all_gone():
        return writer.gone_keys == keys

    assert await until(all_gone) < 1.0


def mapped(reader, partial):
    async def are_copied():
        return all(await reader.client.copy_ahead(partial, [[0]] * len(partial), [0]))

    return are_copied


async def test_layers_are_copied_ahead_of_the_commit(worker, awaited, until):
    writer, reader = await worker(), await worker(keeps_blocks=False)
    (key,) = keys_of(1)
    lease = await writer.client.grant_lease("test", 10_000)
    partial, decided = [], asyncio.Queue()

    async def wait():
        stream = reader.client.await_blocks(lease, [key], True, timeout_s=10, partial=partial)
        async for news in stream:
            decided.put_nowait(news)

    waiting = asyncio.ensure_future(wait())
    layer = writer.engine.spec.layer_bytes
    share = writer.client.open_share(writer)
    await writer.client.reserve(lease, writer.specs([key]), share)
    content = writer.fill(3, 1)
    await writer.client.report_layers(lease, share, [(key, 3, 2)])
    assert await asyncio.wait_for(decided.get(), 5) == ([], [])
    assert [(block.key, block.num_layers) for block in partial] == [(key, 2)]
    unknown = replace(partial[0], pool_page=replace(partial[0].pool_page, pool_id=1))
    await until(mapped(reader, partial))
    blocks = [unknown, *partial]
    async with asyncio.timeout(0.5):  # no pool is waited for
        assert await reader.client.copy_ahead(blocks, [[4], [5]], [0, 0]) == [False, True]
    assert reader.content(4) == bytes(len(content))
    assert reader.content(5) == content[: 2 * layer] + bytes(2 * layer)
    await writer.share_pages(lease, share, [(key, 16, 3)])
    (block,), _ = await asyncio.wait_for(decided.get(), 5)
    await waiting
    assert await reader.client.take_pages(lease, [block], [[5]], [2]) == [True]
    assert reader.content(5) == content
    # What was copied ahead of a later change does not pass for the committed content.
    reader.engine.insert_page(6, memoryview(bytes(len(content))))
    assert await reader.client.take_pages(lease, [block], [[6]], [2]) == [False]
    await writer.client.release([lease])


async def test_who_comes_late_is_told_how_far_a_block_is(worker):
    writer, reader = await worker(), await worker(keeps_blocks=False)
    (key,) = keys_of(1)
    lease = await writer.client.grant_lease("test", 10_000)
    share = writer.client.open_share(writer)
    await writer.client.reserve(lease, writer.specs([key]), share)
    await writer.client.report_layers(lease, share, [(key, 3, 1)])
    await writer.client.report_layers(lease, share, [(key, 3, 3)])
    partial = []
    stream = reader.client.await_blocks(lease, [key], True, timeout_s=10, partial=partial)
    async with contextlib.aclosing(stream):
        assert await anext(stream) == ([], [])
    assert [block.num_layers for block in partial] == [3]
    await writer.client.release([lease])


async def test_a_changed_page_is_found_and_given_up(worker, awaited, until):
    writer, reader = await worker(), await worker(keeps_blocks=False)
    (key,) = keys_of(1)
    lease = await writer.client.grant_lease("test", 10_000)
    writer.fill(3, 1)
    await writer.share(lease, {key: 3})
    blocks, _ = await awaited(reader.client, lease, [key])
    writer.fill(3, 2)
    assert await reader.client.take_pages(lease, blocks, [[0]]) == [False]

    async def gone():
        return writer.gone_keys == [key]

    await until(gone)
    assert await awaited(reader.client, lease, [key]) == ([], [key])
    await writer.client.release([lease])


async def test_a_pool_that_cannot_be_mapped_is_read_through_the_arena(worker, awaited):
    writer, reader = await worker(BogusEngine), await worker(keeps_blocks=False)
    (key,) = keys_of(1)
    lease = await writer.client.grant_lease("test", 10_000)
    content = writer.fill(5, 1)
    await writer.share(lease, {key: 5})
    reading = asyncio.ensure_future(awaited(reader.client, lease, [key]))
    while writer.wanted_keys != [key]:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await writer.write(lease, key, 5)
    blocks, missing = await reading
    assert missing == []
    assert blocks[0].pool_page is None
    assert await reader.client.take_pages(lease, blocks, [[1]]) == [True]
    assert reader.content(1) == content
    await writer.client.release([lease])


async def test_who_cannot_map_is_not_kept_waiting_when_the_writers_lease_ends(
    worker, connect_plain
):
    writer, reader = await worker(), await connect_plain()
    (key,) = keys_of(1)
    first = await writer.client.grant_lease("test", 10_000)
    other = await writer.client.grant_lease("test", 10_000)
    await writer.share(first, {key: 2})
    decided = []

    async def wait():
        async for ready, missing in reader.await_blocks(other, [key], True, timeout_s=10):
            decided.append((ready, missing))

    waiting = asyncio.ensure_future(wait())
    while writer.wanted_keys != [key]:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert decided == []
    await writer.client.release([first])
    await asyncio.wait_for(waiting, 2)
    assert decided == [([], [key])]
    assert writer.gone_keys == [], "the other lease holds it"
    await writer.client.release([other])


@pytest.fixture
async def connect_plain(shared_store):
    """Makes clients that map nothing."""
    async with contextlib.AsyncExitStack() as stack:

        async def make():
            spec = SharedFakeEngine(num_pages=1).spec
            client = await KvStoreClient.connect(
                shared_store.address,
                worker_id=f"plain-{random.getrandbits(64):x}",
                layout=KvLayout(spec.fingerprint, spec.block_tokens, spec.block_bytes),
            )
            stack.push_async_callback(client.close)
            return client

        yield make


async def test_a_pool_goes_with_its_workers_connection(worker, awaited, connect_plain):
    writer = await worker()
    plain = await connect_plain()
    (key,) = keys_of(1)
    lease = await plain.grant_lease("test", 10_000)
    await writer.share(lease, {key: 2})
    await writer.client.close()
    assert writer.is_lost
    while await plain.lookup([key]):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert await awaited(plain, lease, [key]) == ([], [key])
    await plain.release([lease])


async def test_after_a_restart_the_pool_is_shared_anew(worker, own_store):
    writer = await worker(store=own_store)
    before = writer.client.open_share(writer)
    own_store.kill()
    while not writer.is_lost:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert writer.client.open_share(writer) is None
    own_store.start()
    async with asyncio.timeout(10):
        while (after := writer.client.open_share(writer)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert after.pool_id != before.pool_id
    lease = await writer.client.grant_lease("test", 10_000)
    (key,) = keys_of(1)
    await writer.client.reserve(lease, writer.specs([key]), after)
    with pytest.raises(InvalidRequest, match="not shared now"):
        await writer.share_pages(lease, before, [(key, 16, 1)])
    await writer.share_pages(lease, after, [(key, 16, 1)])


async def test_the_store_tells_whether_a_lease_is_live(worker):
    writer = await worker()
    lease = await writer.client.grant_lease("test", 10_000)
    await writer.client.check_lease(lease)
    await writer.client.release([lease])
    with pytest.raises(LeaseEnded):
        await writer.client.check_lease(lease)
