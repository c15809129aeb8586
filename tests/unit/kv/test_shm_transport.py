"""A shared-memory copy begins in time or not at all."""

import asyncio
import os
import threading
import time

import pytest

from splitserve.errors import LeaseEnded, Unavailable
from splitserve.kv.copier import Copier
from splitserve.kv.layout import Lease, Reservation, ReservationState
from splitserve.kv.transports.base import WriteTooLate
from splitserve.kv.transports.handle import Handle
from splitserve.kv.transports.shm import ShmTransport

ARENA_BYTES = 8192
LEASE = Lease("id", 1, "here")
RESERVATION = Reservation(ReservationState.WRITE, 4096, 4096)


@pytest.fixture
def copier():
    copier = Copier(threads=1)
    yield copier
    copier.close()


@pytest.fixture
def transport(copier):
    fd = os.memfd_create("arena")
    os.ftruncate(fd, ARENA_BYTES)
    transport = ShmTransport(Handle(fd, 1, ARENA_BYTES), copier)
    yield transport
    transport.close()


def write(transport, begin_by_s):
    return transport.write(LEASE, b"k" * 32, RESERVATION, 2, memoryview(b"abc"), begin_by_s)


async def test_a_copy_in_time_lands_where_it_belongs(transport):
    await write(transport, time.monotonic() + 60)
    assert bytes(transport.arena[4096:4102]) == b"\0\0abc\0"


async def test_a_copy_that_waited_too_long_for_its_thread_touches_nothing(transport, copier):
    started, may_end = threading.Event(), threading.Event()

    def occupy():
        started.set()
        may_end.wait(10)

    occupied = asyncio.ensure_future(copier.run(occupy))
    await asyncio.to_thread(started.wait, 5)
    begin_by_s = time.monotonic() + 0.05
    waiting = asyncio.ensure_future(write(transport, begin_by_s))
    await asyncio.sleep(begin_by_s - time.monotonic() + 0.01)
    assert not waiting.done()
    may_end.set()
    with pytest.raises(WriteTooLate) as late:
        await waiting
    assert isinstance(late.value, LeaseEnded)
    await occupied
    assert bytes(transport.arena) == bytes(ARENA_BYTES)


async def test_a_span_outlives_the_transport(transport):
    view = transport.span(4096, 8)
    transport.close()
    view[:] = b"12345678"
    assert bytes(view) == b"12345678"
    with pytest.raises(Unavailable):
        transport.span(0, 8)
