"""Buffers are used again, pinned once, and unpinned at the end."""

import asyncio
import threading

import pytest

from splitserve.kv.copier import Copier
from splitserve.kv.staging import Staging


class PinningPages:
    """Pins when it may, and tells what is pinned and which threads unpinned."""

    def __init__(self):
        self.started, self.may_pin = threading.Event(), threading.Event()
        self.may_pin.set()
        self.pinned = []
        self.unpinned_by = []

    def pin(self, memory):
        self.started.set()
        assert self.may_pin.wait(10)
        self.pinned.append(memory)

        def unpin():
            memory[0] = 1  # it is mapped still
            self.pinned.remove(memory)
            self.unpinned_by.append(threading.get_ident())

        return unpin


def test_as_many_buffers_as_are_lent_at_once():
    pages = PinningPages()
    staging = Staging(pages, 8192)
    for _ in range(3):
        with staging.lent() as one, staging.lent() as other:
            assert one is not other
            assert len(one) == len(other) == 8192
    assert len(pages.pinned) == 2
    staging.close()
    staging.close()
    assert pages.pinned == []
    assert len(pages.unpinned_by) == 2


def test_copies_work_where_nothing_can_be_pinned(caplog):
    class Refusing:
        def pin(self, memory):
            raise RuntimeError("no")

    staging = Staging(Refusing(), 8192)
    with staging.lent() as buffer:
        buffer[:4] = b"1234"
    assert "could not be pinned" in caplog.text
    staging.close()


async def test_callers_who_give_up_while_it_pins_leave_one_pinned_buffer():
    pages, copier = PinningPages(), Copier(threads=1)
    pages.may_pin.clear()
    staging = Staging(pages, 8192)

    def use():
        with staging.lent():
            pass

    first = asyncio.ensure_future(copier.run(use))
    await asyncio.to_thread(pages.started.wait, 5)
    first.cancel()
    second = asyncio.ensure_future(copier.run(use))
    await asyncio.sleep(0)
    second.cancel()
    pages.may_pin.set()
    for task in (first, second):
        with pytest.raises(asyncio.CancelledError):
            await task
    await copier.run(use)
    assert len(pages.pinned) == 1
    copier.close()
    staging.close()
    assert pages.pinned == []
