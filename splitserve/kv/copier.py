"""Runs memory copies and digests off the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Copier:
    """A small thread pool. numpy's copies and xxhash's digests let go of the GIL."""

    def __init__(self, threads: int = 0) -> None:
        """`threads` 0: two, or on a large machine half of its cores up to eight."""
        self.threads = threads or max(2, min(8, len(os.sched_getaffinity(0)) // 2))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="kv-copy")
        self._last: list[Future[object]] = []

    async def run(self, work: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """The result of `work`. A cancelled caller gets control back only once the thread no
        longer touches its buffers, so that their owner may use them for something else.
        """
        job = self._pool.submit(work, *args, **kwargs)
        done = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not job.cancel():
                await _outlast(done)
            raise

    def later(self, work: Callable[[], object]) -> None:
        """Have a thread do it some time, before `close` returns."""
        self._last.append(self._pool.submit(work))
        self._last = [job for job in self._last if not job.done()]

    def close(self) -> None:
        """Lets running copies end."""
        wait(self._last)
        self._pool.shutdown(wait=True, cancel_futures=True)


async def _outlast(done: asyncio.Future[_R]) -> None:
    """Waits for a running copy, whatever further cancellations come (a few milliseconds)."""
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            continue
    if not done.cancelled():
        done.exception()  # looked at, so that it is not reported as never retrieved
