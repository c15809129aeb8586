"""Many blocks at once between pages and a real store, in slices for several threads."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest

from splitserve.engine.fake import FakeEngine
from splitserve.engine.fake_shared import SharedFakeEngine
from splitserve.kv.client import KvStoreClient
from splitserve.kv.codec import BlockHasher, block_digest
from splitserve.kv.layout import BlockSpec, KvLayout
from splitserve.kv.page_part import PagePart
from splitserve.worker.pages import EnginePages

COUNT = 6
TOKENS = 1024


def make_engine(kind=FakeEngine):
    """Pages of half a MiB."""
    return kind(num_pages=16, num_layers=64, block_tokens=TOKENS)


SPEC = make_engine().spec


@pytest.fixture
async def client_of(shared_store):
    """Makes clients of an engine's pool."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(engine, transport, pages=None):
            client = await KvStoreClient.connect(
                shared_store.address,
                worker_id=f"worker-{random.getrandbits(64):x}",
                layout=KvLayout(SPEC.fingerprint, TOKENS, SPEC.block_bytes),
                transport=transport,
                pages=pages or EnginePages(engine),
            )
            stack.push_async_callback(client.close)
            return client

        yield make


async def all_but_the_fifth_are_taken(awaited, reader, target, lease, keys, contents):
    """Each to two pages; the fifth is given up."""
    blocks, missing = await awaited(reader, lease, keys)
    assert missing == []
    blocks.sort(key=lambda block: keys.index(block.key))
    targets = [[2 * at, 2 * at + 1] for at in range(COUNT)]
    whole = await reader.take_pages(lease, blocks, targets)
    assert whole == [True, True, True, True, False, True]
    for at in (0, 1, 2, 3, 5):
        for page in targets[at]:
            assert page_of(target, page) == contents[at]
    assert (await awaited(reader, lease, [keys[4]]))[1] == [keys[4]], "it was given up"


def page_of(engine, page):
    out = bytearray(SPEC.block_bytes)
    engine.export_page(page, 0, SPEC.num_layers, memoryview(out))
    return bytes(out)


WAYS = [("shm", "shm"), ("shm", "grpc"), ("grpc", "shm")]


@pytest.mark.parametrize(("writes", "reads"), WAYS)
async def test_blocks_go_from_pages_to_pages(client_of, awaited, writes, reads):
    source, target = make_engine(), make_engine()
    writer, reader = await client_of(source, writes), await client_of(target, reads)
    keys = [random.randbytes(32) for _ in range(COUNT)]
    contents = [random.Random(at).randbytes(SPEC.block_bytes) for at in range(COUNT)]
    for page, content in enumerate(contents):
        source.insert_page(page, memoryview(content))
    lease = await writer.grant_lease("test", 10_000)
    specs = [BlockSpec(key, SPEC.block_bytes, TOKENS) for key in keys]
    reservations = await writer.reserve(lease, specs)
    fingerprint = writer.layout.fingerprint
    hashers = [BlockHasher(key, TOKENS, fingerprint, SPEC.block_bytes) for key in keys]
    for first, end in ((0, 40), (40, 64)):
        await writer.put_pages(
            lease,
            [
                PagePart(key, reservation, page, first, end, hasher)
                for page, (key, reservation, hasher) in enumerate(
                    zip(keys, reservations, hashers, strict=True)
                )
            ],
        )
    digests = [hasher.digest() for hasher in hashers]
    assert digests == [
        block_digest(key, TOKENS, fingerprint, content)
        for key, content in zip(keys, contents, strict=True)
    ]
    digests[4] = bytes(17)  # as if it had been damaged
    await writer.commit(lease, zip(keys, digests, strict=True))
    await all_but_the_fifth_are_taken(awaited, reader, target, lease, keys, contents)
    for page in (8, 9):
        assert page_of(target, page) == bytes(SPEC.block_bytes), "what is damaged touches no page"
    await writer.release([lease])


@pytest.mark.parametrize("reader_digests", [True, False])
@pytest.mark.parametrize(("writes", "reads"), WAYS)
async def test_blocks_of_a_device_that_digests_pages_go_to_any_reader(
    client_of, awaited, writes, reads, reader_digests
):
    source = make_engine(SharedFakeEngine)
    target = make_engine(SharedFakeEngine if reader_digests else FakeEngine)
    writer, reader = await client_of(source, writes), await client_of(target, reads)
    assert writer.seals_pages
    assert reader.seals_pages == reader_digests
    keys = [random.randbytes(32) for _ in range(COUNT)]
    contents = [random.Random(at).randbytes(SPEC.block_bytes) for at in range(COUNT)]
    for page, content in enumerate(contents):
        source.insert_page(page, memoryview(content))
    lease = await writer.grant_lease("test", 10_000)
    reservations = await writer.reserve(
        lease, [BlockSpec(key, SPEC.block_bytes, TOKENS) for key in keys]
    )
    for first, end in ((0, 40), (40, 64)):
        parts = [
            PagePart(key, reservation, page, first, end, None)
            for page, (key, reservation) in enumerate(zip(keys, reservations, strict=True))
        ]
        await writer.put_pages(lease, parts)
    places = [(key, TOKENS, page) for page, key in enumerate(keys)]
    digests = await writer.seal_pages(places, staying=False)
    # As one without a device writes it: whichever kind they are of, they are taken together.
    digests[1] = block_digest(keys[1], TOKENS, writer.layout.fingerprint, contents[1])
    digests[4] = digests[4][:-1] + b"?"
    await writer.commit(lease, zip(keys, digests, strict=True))
    await all_but_the_fifth_are_taken(awaited, reader, target, lease, keys, contents)
    await writer.release([lease])


class PinningPages(EnginePages):
    """Tells in which threads memory was pinned and unpinned."""

    def __init__(self, engine):
        super().__init__(engine)
        self.pinned_in, self.unpinned_in = [], []

    def pin(self, memory):
        self.pinned_in.append(threading.current_thread())
        return lambda: self.unpinned_in.append(threading.current_thread())


async def test_nothing_is_pinned_or_unpinned_on_the_event_loop(client_of):
    engine = make_engine()
    pages = PinningPages(engine)
    client = await client_of(engine, "shm", pages)
    assert pages.pinned_in == [], "the arena itself is not"
    key = random.randbytes(32)
    lease = await client.grant_lease("test", 10_000)
    (reservation,) = await client.reserve(lease, [BlockSpec(key, SPEC.block_bytes, TOKENS)])
    hasher = BlockHasher(key, TOKENS, client.layout.fingerprint, SPEC.block_bytes)
    part = PagePart(key, reservation, 0, 0, SPEC.num_layers, hasher)
    await client.put_pages(lease, [part])
    assert (len(pages.pinned_in), pages.unpinned_in) == (1, [])
    await client.release([lease])
    await client.close()
    assert len(pages.unpinned_in) == 1
    assert threading.current_thread() not in pages.pinned_in + pages.unpinned_in
