"""A cancelled copy has let go of its buffers when the caller gets control back."""

import asyncio
import threading

import pytest

from splitserve.kv.copier import Copier


@pytest.fixture
def copier():
    copier = Copier(threads=1)
    yield copier
    copier.close()


async def test_returns_and_raises_what_the_work_does(copier):
    assert await copier.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await copier.run(divmod, 7, 0)


async def test_cancellation_outlasts_a_running_copy(copier):
    started, may_end, ended = threading.Event(), threading.Event(), []

    def work():
        started.set()
        assert may_end.wait(5)
        ended.append(True)

    task = asyncio.ensure_future(copier.run(work))
    await asyncio.to_thread(started.wait, 5)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_cancellation_drops_a_copy_that_has_not_begun(copier):
    started, may_end = threading.Event(), threading.Event()

    def block():
        started.set()
        may_end.wait(5)

    first = asyncio.ensure_future(copier.run(block))
    await asyncio.to_thread(started.wait, 5)
    touched = []
    second = asyncio.ensure_future(copier.run(touched.append, 1))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    may_end.set()
    await first
    assert touched == []


async def test_what_may_come_later_is_beside_the_copies_and_ends_before_the_copier(copier, caplog):
    may_end, done = threading.Event(), []

    def slow():
        assert may_end.wait(5)
        done.append("slow")

    def fails():
        raise RuntimeError("unforeseen")

    copier.later(slow)
    copier.later(fails)
    assert await copier.run(divmod, 7, 2) == (3, 1), "its one thread is free"
    may_end.set()
    copier.close()
    assert done == ["slow"]
    assert "unforeseen" in caplog.text
