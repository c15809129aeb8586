"""A service process's way from its first signal to its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from splitserve.gc_heap import freeze_gc_heap

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_log = logging.getLogger(__name__)


async def run_until_signal(
    drain: Callable[[], Awaitable[None]],
    stop: Callable[[], Awaitable[None]],
    *,
    failed: Awaitable[object] | None = None,
) -> None:
    """Waits for SIGTERM or SIGINT, then drains, then stops.

    A second signal cuts the draining short. `stop` always runs, once. If `failed` ends first the
    service cannot go on: it is stopped without draining, and what `failed` raised is raised.
    Call it from the main thread, when everything that lasts has been made.
    """
    freeze_gc_heap()
    async with _signals() as signals:
        first = asyncio.ensure_future(signals.get())
        watched: set[asyncio.Future[Any]] = {first}
        if failed is not None:
            watched.add(asyncio.ensure_future(failed))
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                _log.info("%s: draining; a second signal stops at once", first.result().name)
                await _drain_or_second_signal(drain, signals)
            for future in watched - {first}:
                if future.done():
                    future.result()
        finally:
            for future in watched:
                future.cancel()
            await stop()


async def _drain_or_second_signal(
    drain: Callable[[], Awaitable[None]], signals: asyncio.Queue[signal.Signals]
) -> None:
    draining = asyncio.ensure_future(drain())
    second = asyncio.ensure_future(signals.get())
    try:
        await asyncio.wait({draining, second}, return_when=asyncio.FIRST_COMPLETED)
        if second.done():
            _log.warning("%s again: stopping at once", second.result().name)
        else:
            draining.result()
    finally:
        second.cancel()
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await draining


@contextlib.asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Queue[signal.Signals]]:
    queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield queue
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """The kernel sends `number` to this process when the thread that started it ends.

    Linux only; elsewhere nothing happens. Start children from the launcher's main thread: it is
    the thread, not the process, that the kernel watches.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    # The parent may have ended before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
