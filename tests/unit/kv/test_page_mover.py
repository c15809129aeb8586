"""Work is cut into slices that lose nothing, and whatever else writes to the arena does no harm."""

import math
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splitserve_kernels.page_digest_rules import digest_pages_reference

from splitserve.errors import Unavailable
from splitserve.kv import page_mover
from splitserve.kv.codec import BlockHasher, block_digest
from splitserve.kv.copier import Copier
from splitserve.kv.layout import KvLayout, Lease, ReadableBlock, Reservation, ReservationState
from splitserve.kv.page_mover import PageMover
from splitserve.kv.page_part import PagePart
from splitserve.kv.transports.handle import Handle
from splitserve.kv.transports.shm import ShmTransport

BLOCK_BYTES = 1 << 20
PARTS = 6
ARENA_BYTES = PARTS * BLOCK_BYTES
LAYOUT = KvLayout(b"m" * 32, 16, BLOCK_BYTES)
LEASE = Lease("id", 1, "here")


@given(
    count=st.integers(1, 200),
    item_bytes=st.sampled_from([1, 512, 1 << 18, 1 << 20, 1 << 21]),
    threads=st.integers(1, 8),
)
def test_slices_are_all_items_in_order(count, item_bytes, threads):
    copier = Copier(threads)
    mover = PageMover(StubPages(), copier, KvLayout(b"m" * 32, 16, 4096))
    slices = mover.slices(range(count), item_bytes)
    copier.close()
    assert [item for part in slices for item in part] == list(range(count))
    assert all(slices)
    assert len(slices) <= threads
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1
    if len(slices) > 1:
        assert count * item_bytes > 1 << 20, "one thread does for less than a MiB"


class StubPages:
    """Pages of one layer each in host memory. `before_insert` runs before pages are overwritten."""

    layer_bytes = BLOCK_BYTES
    shared = None

    def __init__(self):
        self.content = {}
        self.before_insert = lambda: None
        self.after_export = lambda: None

    def export_pages(self, pages, first_layer, end_layer, outs):
        for page, out in zip(pages, outs, strict=True):
            out[:] = self.content[page]
        self.after_export()

    def insert_pages(self, pages, contents):
        self.before_insert()
        for page, content in zip(pages, contents, strict=True):
            self.content[page] = bytes(content)

    def pin(self, memory):
        return lambda: None


class DamagingHasher(BlockHasher):
    """Has a stale write land in the arena just before it takes the digest."""

    damage = None

    def update(self, content):
        self.damage()
        super().update(content)


class Rig:
    """A writer and a reader with an arena between them."""

    def __init__(self):
        self.copier = Copier(threads=1)
        self.source, self.target = StubPages(), StubPages()
        self.writer = PageMover(self.source, self.copier, LAYOUT)
        self.reader = PageMover(self.target, self.copier, LAYOUT)
        fd = os.memfd_create("arena")
        os.ftruncate(fd, ARENA_BYTES)
        self.transport = ShmTransport(Handle(fd, 1, ARENA_BYTES), self.copier)
        self.hashers = {}

    def part(self, page, hasher=BlockHasher):
        key = bytes([page]) * 32
        self.source.content[page] = random.Random(page).randbytes(BLOCK_BYTES)
        self.hashers[key] = made = hasher(key, 16, LAYOUT.fingerprint, BLOCK_BYTES)
        place = Reservation(ReservationState.WRITE, page * BLOCK_BYTES, BLOCK_BYTES)
        return PagePart(key, place, page, 0, 1, made)

    async def put(self, *parts, begin_by_s=math.inf):
        return await self.writer.put(self.transport, LEASE, parts, begin_by_s)

    async def take(self, *parts):
        blocks = [
            ReadableBlock(
                part.key,
                part.reservation.arena_offset,
                BLOCK_BYTES,
                self.hashers[part.key].digest(),
                16,
            )
            for part in parts
        ]
        targets = [[part.page] for part in parts]
        return await self.reader.take(self.transport, LEASE, blocks, targets)

    def damage(self):
        self.transport.arena[BLOCK_BYTES + 5] ^= 1


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.transport.close()
    rig.copier.close()
    rig.writer.close()
    rig.reader.close()


async def test_a_stale_write_before_the_digest_is_found_by_the_reader(rig):
    good, bad = rig.part(0), rig.part(1, DamagingHasher)
    bad.hasher.damage = rig.damage
    assert await rig.put(good, bad) == 2
    content = rig.source.content[1]
    assert bad.hasher.digest() == block_digest(bad.key, 16, LAYOUT.fingerprint, content)
    rig.target.content[1] = b"as it was"
    assert await rig.take(good, bad) == [True, False]
    assert rig.target.content == {0: rig.source.content[0], 1: b"as it was"}


async def test_a_stale_write_during_the_export_does_not_get_into_the_digest(rig):
    part = rig.part(1)
    rig.source.after_export = rig.damage
    await rig.put(part)
    assert part.hasher.digest() == block_digest(
        part.key, 16, LAYOUT.fingerprint, rig.source.content[1]
    )
    assert await rig.take(part) == [True]


async def test_an_extent_that_is_reused_after_the_check_does_no_harm(rig):
    part = rig.part(1)
    await rig.put(part)
    rig.target.before_insert = rig.damage
    assert await rig.take(part) == [True]
    assert rig.target.content == {1: rig.source.content[1]}


async def test_no_copy_to_the_arena_begins_too_late_and_the_rest_can_follow(rig, monkeypatch):
    parts = [rig.part(page) for page in range(PARTS)]
    now = [0.0]
    monkeypatch.setattr(page_mover.time, "monotonic", lambda: now[0])

    def later():
        now[0] += 1

    rig.source.after_export = later
    fitting = await rig.put(*parts, begin_by_s=2.0)
    assert 0 < fitting < PARTS, "the second batch came too late"
    assert bytes(rig.transport.arena[fitting * BLOCK_BYTES :]) == bytes(
        ARENA_BYTES - fitting * BLOCK_BYTES
    )
    assert await rig.put(*parts[fitting:]) == PARTS - fitting
    assert await rig.take(*parts) == [True] * PARTS
    assert rig.target.content == rig.source.content


class StubDevice(StubPages):
    """Pages that a device digests and copies to and from an arena. `before_copy` runs first."""

    def __init__(self):
        super().__init__()
        self.shared = self
        self.before_copy = lambda: None
        self.now, self.prepared = 0.0, False
        self.opened, self.closed = [], []

    def open_host(self, memory):
        self.opened.append(memory)
        return StubArena(memory, self.closed)

    def prepare_pages(self):
        self.prepared = True

    def copy_to_host(self, host, pages, first_layer, end_layer, offsets, begin_by_s):
        self.before_copy()
        if self.now >= begin_by_s:
            return False
        for page, offset in zip(pages, offsets, strict=True):
            host.memory[offset : offset + BLOCK_BYTES] = self.content[page]
        self.after_export()
        return True

    def copy_from_host(self, host, offsets, own_pages):
        self.before_copy()
        for page, offset in zip(own_pages, offsets, strict=True):
            self.content[page] = bytes(host.memory[offset : offset + BLOCK_BYTES])
        return self.digest_pages(own_pages)

    def digest_pages(self, pages):
        rows = np.stack([np.frombuffer(self.content[page], np.uint8) for page in pages])
        return digest_pages_reference(rows, range(len(pages)))


class StubArena:
    def __init__(self, memory, closed):
        self.memory = memory
        self.prepared = 0
        self._closed = closed

    def prepare(self):
        self.prepared += 1
        raise OSError("cannot be pinned")

    def close(self):
        self._closed.append(self)


class DeviceRig(Rig):
    """Both ends have a device."""

    def __init__(self):
        super().__init__()
        self.source, self.target = StubDevice(), StubDevice()
        self.writer = PageMover(self.source, self.copier, LAYOUT)
        self.reader = PageMover(self.target, self.copier, LAYOUT)

    def part(self, page):
        return replace(super().part(page), hasher=None)

    async def take(self, *parts):
        blocks = [
            ReadableBlock(part.key, part.reservation.arena_offset, BLOCK_BYTES, digest, 16)
            for part, digest in zip(parts, await self.seal(*parts), strict=True)
        ]
        return await self.reader.take(
            self.transport, LEASE, blocks, [[part.page] for part in parts]
        )

    async def seal(self, *parts):
        return await self.writer.device.seal([(part.key, 16, part.page) for part in parts])


@pytest.fixture
def device_rig():
    rig = DeviceRig()
    yield rig
    rig.transport.close()
    rig.copier.close()
    rig.writer.close()
    rig.reader.close()
    assert len(rig.source.closed) == len(rig.source.opened)
    assert len(rig.target.closed) == len(rig.target.opened)


async def test_a_device_needs_no_buffers(device_rig):
    rig, parts = device_rig, [device_rig.part(page) for page in range(PARTS)]
    assert rig.writer.parts_to_put(rig.transport, parts) == [parts]
    assert await rig.put(*parts) == PARTS
    assert await rig.take(*parts) == [True] * PARTS
    assert rig.target.content == rig.source.content
    assert (len(rig.source.opened), len(rig.target.opened)) == (1, 1)


async def test_a_stale_write_is_found_on_the_pages_that_a_device_has_copied(device_rig):
    rig, parts = device_rig, [device_rig.part(0), device_rig.part(1)]
    rig.source.after_export = rig.damage
    await rig.put(*parts)
    assert await rig.take(*parts) == [True, False]


async def test_no_copy_of_a_device_begins_too_late(device_rig):
    part = device_rig.part(0)
    device_rig.source.now = 2.0
    assert await device_rig.put(part, begin_by_s=2.0) == 0
    assert bytes(device_rig.transport.arena) == bytes(ARENA_BYTES)
    assert await device_rig.put(part, begin_by_s=2.1) == 1


async def test_of_several_groups_of_layers_those_in_time_count(device_rig):
    rig, parts = device_rig, [device_rig.part(0), replace(device_rig.part(1), end_layer=2)]

    def later():
        rig.source.now += 1.0

    rig.source.before_copy = later
    assert await rig.put(*parts, begin_by_s=1.5) == 1
    assert not any(rig.transport.arena[BLOCK_BYTES : 2 * BLOCK_BYTES])
    assert await rig.put(*parts[1:]) == 1
    assert await rig.take(*parts) == [True, True]


@pytest.mark.parametrize("end", ["source", "target"])
async def test_what_a_device_cannot_reach_goes_through_buffers(device_rig, end):
    """By the same digests."""
    rig, parts = device_rig, [device_rig.part(0), device_rig.part(1)]

    refused = []

    def refuse():
        refused.append(end)
        raise PermissionError("cannot be pinned")

    stub = getattr(rig, end)
    stub.before_copy = refuse
    for _ in range(2):
        assert await rig.put(*parts) == 2
        assert await rig.take(*parts) == [True, True]
    assert rig.target.content == rig.source.content
    assert refused == [end], "it is not tried again"


async def test_a_copy_that_fails_on_a_device_goes_through_buffers(device_rig):
    """And the next one does not."""
    rig, parts = device_rig, [device_rig.part(page) for page in range(3)]
    failures = iter([None, OSError("the device is out of memory"), None])

    def fail_once():
        if fault := next(failures, None):
            raise fault

    rig.source.before_copy = fail_once
    for part in parts:
        assert await rig.put(part) == 1
    assert rig.source.closed == []
    assert await rig.take(*parts) == [True, True, True]


async def test_blocks_of_either_kind_are_taken_as_each_can_be(device_rig):
    rig, parts = device_rig, [device_rig.part(page) for page in range(PARTS)]
    await rig.put(*parts)
    digests = await rig.seal(*parts)
    for at in (1, 4):
        content = rig.source.content[at]
        digests[at] = block_digest(parts[at].key, 16, LAYOUT.fingerprint, content)
    blocks = [
        ReadableBlock(part.key, part.reservation.arena_offset, BLOCK_BYTES, digest, 16)
        for part, digest in zip(parts, digests, strict=True)
    ]
    assert rig.reader.blocks_to_take(rig.transport, blocks) == [[0, 2, 3, 5], [1, 4]]
    rig.damage()  # of block 1
    targets = [[page] for page in range(PARTS)]
    whole = await rig.reader.take(rig.transport, LEASE, blocks, targets)
    assert whole == [at != 1 for at in range(PARTS)]


async def test_without_an_arena_a_device_compiles_ahead(device_rig):
    device_rig.writer.prepare(None)
    device_rig.copier._aside.shutdown(wait=True)
    assert device_rig.source.prepared


async def test_a_closed_transport_gives_up_what_the_device_has_of_its_arena(device_rig):
    rig, part = device_rig, device_rig.part(0)
    await rig.put(part)
    assert rig.source.closed == []
    rig.transport.close()
    with pytest.raises(Unavailable):
        await rig.put(part)
    rig.copier.close()
    assert len(rig.source.closed) == 1
