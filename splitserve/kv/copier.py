"""Runs memory copies and digests off the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


_log = logging.getLogger(__name__)


class Copier:
    """A small thread pool. numpy's copies and xxhash's digests let go of the GIL."""

    def __init__(self, threads: int = 0) -> None:
        """`threads` 0: two, or on a large machine half of its cores up to eight."""
        self.threads = threads or max(2, min(8, len(os.sched_getaffinity(0)) // 2))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="kv-copy")
        # What may take seconds, and nobody waits for.
        self._aside = ThreadPoolExecutor(2, thread_name_prefix="kv-aside")

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
        """Have another thread do it, before `close` returns. What fails is logged."""
        self._aside.submit(work).add_done_callback(_log_fault)

    def close(self) -> None:
        """Lets running copies end."""
        self._aside.shutdown(wait=True)
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


def _log_fault(job: Future[object]) -> None:
    if fault := job.exception():
        _log.error("work beside the copies failed", exc_info=fault)
