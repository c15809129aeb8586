"""The pages of a GPU's pool for hand-overs, with memory of the host in a GPU's place."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from splitserve_kernels.page_digest_rules import digest_pages_reference

from splitserve.engine import device_pages, host_memory
from splitserve.engine.device_pages import DevicePages, DevicePeer
from splitserve.engine.host_memory import OFFSET_BYTES, HostMemory
from splitserve.kv.pages import LayerRun, SharesPages
from splitserve.worker.pages import MovesPages

PAGES, LAYERS, LAYER_BYTES = 6, 4, 64


class HostPages(DevicePages):
    """Has no stream to wait for, and no driver to ask."""

    settle: Callable[[], None] = staticmethod(lambda: None)

    @contextmanager
    def _queued(self) -> Iterator[None]:
        yield

    def _settle(self) -> None:
        self.settle()


def make(seed: int) -> tuple[HostPages, torch.Tensor]:
    torch.manual_seed(seed)
    pool = torch.randint(0, 256, (PAGES, LAYERS * LAYER_BYTES), dtype=torch.uint8)
    return HostPages(pool, LAYER_BYTES, None), pool


def test_layers_of_many_pages_leave_and_whole_pages_enter() -> None:
    (source, theirs), (target, own) = make(1), make(2)
    parts = [[memoryview(bytearray(2 * LAYER_BYTES)) for _ in range(2)] for _ in range(2)]
    for half, outs in enumerate(parts):
        source.export_pages([4, 1], 2 * half, 2 * half + 2, outs)
    whole = [memoryview(bytearray(a) + bytearray(b)) for a, b in zip(*parts, strict=True)]
    target.insert_pages([0, 5], whole)
    assert torch.equal(own[[0, 5]], theirs[[4, 1]])


def test_pages_of_a_peer_are_copied_and_digested() -> None:
    (source, theirs), (target, own) = make(1), make(2)
    assert isinstance(target, SharesPages)
    assert isinstance(target, MovesPages)
    whole = LayerRun([4, 1, 1], [0, 5, 2], 0, LAYERS)
    digests = target.copy_from_peer(DevicePeer(theirs, None), [whole], [0, 5, 2])
    assert torch.equal(own[[0, 5, 2]], theirs[[4, 1, 1]])
    assert digests == target.digest_pages([0, 5, 2]) == source.digest_pages([4, 1, 1])
    assert digests == digest_pages_reference(theirs.numpy(), [4, 1, 1])


def test_layers_of_a_peer_are_copied_alone() -> None:
    (_, theirs), (target, own) = make(1), make(2)
    expected, part = own.clone(), slice(LAYER_BYTES, 3 * LAYER_BYTES)
    expected[[0, 5], part] = theirs[[4, 1], part]
    expected[[3], :LAYER_BYTES] = theirs[[2], :LAYER_BYTES]
    runs = [LayerRun([4, 1], [0, 5], 1, 3), LayerRun([2], [3], 0, 1)]
    assert target.copy_from_peer(DevicePeer(theirs, None), runs) == []
    assert torch.equal(own, expected)


def test_a_peer_that_lacks_the_page_or_is_closed_is_an_error_of_the_system() -> None:
    (_, theirs), (target, _) = make(1), make(2)
    peer = DevicePeer(theirs, None)
    with pytest.raises(OSError, match="6 pages"):
        target.copy_from_peer(peer, [LayerRun([1], [0], 0, 1), LayerRun([6], [0], 0, LAYERS)])
    peer.close()
    with pytest.raises(OSError, match="closed"):
        target.copy_from_peer(peer, [LayerRun([1], [0], 0, LAYERS)])


def test_its_own_handle_is_its_own_pool() -> None:
    source, pool = make(1)
    before = pool.clone()
    source.prepare_pages()
    assert torch.equal(pool, before), "kernels are compiled over other memory"
    handle = source._name + pool.shape[1].to_bytes(8, "little") + bytes(80)
    peer = source.open_peer(handle)
    assert peer.pages() is pool
    peer.close()


@pytest.mark.parametrize("handle", [b"", b"x" * 23, b"x" * 16 + (1).to_bytes(8, "little")])
def test_a_handle_of_something_else_is_refused(handle: bytes) -> None:
    with pytest.raises(ConnectionError):
        make(1)[0].open_peer(handle)


class Mapping:
    """Memory of the host in place of a peer's."""

    def __init__(self, size_bytes: int) -> None:
        self.bytes = torch.zeros(size_bytes, dtype=torch.uint8)
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


@pytest.mark.parametrize("spare", [0, 1])
def test_a_handle_of_a_part_of_a_page_leaves_nothing_mapped(
    monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    (source, _), (target, own) = make(1), make(2)
    mapping = Mapping(2 * own.shape[1] + spare)
    monkeypatch.setattr(device_pages, "MappedMemory", lambda *_: mapping)
    handle = source._name + own.shape[1].to_bytes(8, "little")
    if spare:
        with pytest.raises(OSError, match="part of a page"):
            target.open_peer(handle)
        assert not mapping.is_open
    else:
        assert target.open_peer(handle).pages().shape == (2, own.shape[1])
        assert mapping.is_open


class Driver:
    """Notes what is registered, in place of a GPU's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.registered: dict[int, int] = {}
        self.refuses = False
        patch.setattr(host_memory, "register", self.register)
        patch.setattr(host_memory, "unregister", lambda address, _: self.registered.pop(address))
        patch.setattr(host_memory, "_PIECE_BYTES", 2 * OFFSET_BYTES)

    def register(self, address: int, size_bytes: int, _: torch.device) -> None:
        if self.refuses:
            raise PermissionError("cannot be pinned")
        assert address not in self.registered
        self.registered[address] = size_bytes


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def make_arena(size_bytes: int = 5 * OFFSET_BYTES) -> memoryview:
    return memoryview(bytearray(random.Random(3).randbytes(size_bytes)))


def test_pages_go_to_the_arena_by_layers_and_back_from_there(driver: Driver) -> None:
    (source, theirs), (target, own) = make(1), make(2)
    arena = make_arena()
    expected = bytearray(arena)
    writes = source.open_host(arena)
    offsets = [OFFSET_BYTES, 4 * OFFSET_BYTES]
    assert source.copy_to_host(writes, [4, 1], 0, 3, offsets, math.inf)
    assert source.copy_to_host(writes, [4, 1], 3, LAYERS, offsets, math.inf)
    for page, offset in zip([4, 1], offsets, strict=True):
        expected[offset : offset + LAYERS * LAYER_BYTES] = theirs[page].numpy().tobytes()
    assert bytes(arena) == bytes(expected)
    writes.close()
    reads = target.open_host(arena)
    digests = target.copy_from_host(reads, [offsets[1], offsets[0], offsets[0]], [5, 0, 3])
    assert torch.equal(own[[5, 0, 3]], theirs[[1, 4, 4]])
    assert digests == digest_pages_reference(theirs.numpy(), [1, 4, 4])
    assert sorted(driver.registered.values()) == [OFFSET_BYTES, 2 * OFFSET_BYTES], (
        "pieces that were used, of the last of which there is half"
    )
    reads.close()
    reads.close()
    assert driver.registered == {}


def test_where_rows_begin_is_registered_whichever_are_used(driver: Driver) -> None:
    """The driver is asked for the address that a kernel is given."""
    pages, _ = make(1)
    arena = make_arena()
    host = pages.open_host(arena)
    pages.copy_from_host(host, [4 * OFFSET_BYTES], [1])
    assert np.frombuffer(arena, np.uint8).ctypes.data in driver.registered
    assert len(driver.registered) == 2


@pytest.mark.parametrize("offset", [-OFFSET_BYTES, 8, 5 * OFFSET_BYTES])
def test_places_that_an_arena_does_not_have(driver: Driver, offset: int) -> None:
    pages, _ = make(1)
    host = pages.open_host(make_arena())
    with pytest.raises(OSError, match=r"begins|ends"):
        pages.copy_from_host(host, [0, offset], [1, 2])
    with pytest.raises(OSError, match=r"begins|ends"):
        pages.copy_to_host(host, [1], 0, 1, [offset], math.inf)
    assert driver.registered == {}


def test_an_arena_that_was_given_up_or_cannot_be_pinned(driver: Driver) -> None:
    pages, _ = make(1)
    host = pages.open_host(make_arena())
    driver.refuses = True
    with pytest.raises(PermissionError, match="pinned"):
        pages.copy_from_host(host, [0], [1])
    host.close()
    with pytest.raises(OSError, match="given up"):
        pages.copy_from_host(host, [0], [1])
    with pytest.raises(TypeError):
        pages.copy_from_host(DevicePeer(torch.zeros(1), None), [0], [1])


def test_no_copy_to_the_arena_begins_too_late(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued ahead of it takes long."""
    pages, _ = make(1)
    arena = make_arena()
    before, now = bytes(arena), [1.0]
    monkeypatch.setattr(device_pages.time, "monotonic", lambda: now[0])

    def settle() -> None:
        now[0] += 1.0

    pages.settle = settle
    host = pages.open_host(arena)
    assert not pages.copy_to_host(host, [1], 0, LAYERS, [0], 2.0)
    assert bytes(arena) == before
    assert pages.copy_to_host(host, [1], 0, LAYERS, [0], 3.5)
    assert bytes(arena) != before


def test_an_arena_is_prepared_ahead(driver: Driver) -> None:
    pages, _ = make(1)
    compiled: list[bool] = []
    host = HostMemory(make_arena(), torch.device("cpu"), lambda: compiled.append(True))
    host.prepare()
    assert compiled
    before = dict(driver.registered)
    assert sorted(before.values()) == [OFFSET_BYTES, 2 * OFFSET_BYTES, 2 * OFFSET_BYTES]
    pages.copy_from_host(host, [3 * OFFSET_BYTES], [1])
    assert driver.registered == before
    host.close()
    host.prepare()
    assert driver.registered == {}


def test_an_arena_is_given_up_by_the_last_copy_under_way(driver: Driver) -> None:
    pages, _ = make(1)
    host = pages.open_host(make_arena())
    with host.places([0], 0, 8) as places:
        host.close()
        assert len(driver.registered) == 1
        assert places.shape == (5, 8)
    assert driver.registered == {}
