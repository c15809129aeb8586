"""Ready means serving: now and then the router generates something, as for a client.

Without the prefill tier or its stores decode workers compute prompts, more slowly; the router
serves and is ready then, and says in the log and in a gauge that the tiers are not split. Only at
its start it waits for the split, for a bounded time, so that a suite of which the decode tier
comes up first is not called ready before the rest of it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from splitserve.errors import SplitserveError

_log = logging.getLogger(__name__)

RETRY_S = 0.25


class Canary(Protocol):
    """A real generation, short."""

    async def __call__(self, timeout_s: float) -> bool:
        """Generate; whether the prefill tier took part. Raises what went wrong."""
        ...


class Readiness:
    """Runs the canary every `interval_s`, more often while it fails.

    Tells `set_ready`, and `set_split` whether the prefill tier takes part. It is ready for the
    first time when that tier has taken part, or `split_wait_s` after the first success without.
    """

    def __init__(
        self,
        canary: Canary,
        set_ready: Callable[[bool], None],
        set_split: Callable[[bool], object],
        *,
        interval_s: float,
        timeout_s: float,
        split_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._canary = canary
        self._set_ready = set_ready
        self._set_split = set_split
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._split_wait_s = split_wait_s
        self._clock = clock
        self._first_success_s: float | None = None
        self._started = False
        self._split = False
        self._ready = False
        self._stopped = False

    @property
    def ready(self) -> bool:
        """Whether the last canary succeeded, once the wait for the split is over."""
        return self._ready

    def stop(self) -> None:
        """Not ready from now on, whatever the canary says."""
        self._stopped = True
        self._tell(False)

    async def run(self) -> None:
        """Go on until cancelled."""
        while not self._stopped:
            self._tell(await self._try())
            await asyncio.sleep(self._interval_s if self._ready else RETRY_S)

    async def _try(self) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                split = await self._canary(self._timeout_s)
        except TimeoutError:
            return self._failed(f"no answer within {self._timeout_s:g} s")
        except SplitserveError as error:
            return self._failed(error.message)
        except Exception:
            _log.exception("the canary failed")
            return self._failed("a fault of the router")
        if self._split and not split:
            _log.warning("the prefill tier or its store is out of service, decode does without")
        elif split and not self._split:
            _log.info("the prefill tier computes prompts")
        self._tell_split(split)
        return self._enough(split)

    def _enough(self, split: bool) -> bool:
        """Whether a success is one to be ready on."""
        now = self._clock()
        if self._first_success_s is None:
            self._first_success_s = now
        self._started |= split or now - self._first_success_s >= self._split_wait_s
        return self._started

    def _failed(self, reason: str) -> bool:
        if self._ready:
            _log.warning("not ready: %s", reason)
        else:
            _log.debug("not ready yet: %s", reason)
        self._tell_split(False)
        return False

    def _tell_split(self, split: bool) -> None:
        self._split = split
        self._set_split(split)

    def _tell(self, ready: bool) -> None:
        ready = ready and not self._stopped
        if ready and not self._ready:
            _log.info("ready" if self._split else "ready, with decode workers computing prompts")
        if ready != self._ready:
            self._ready = ready
            self._set_ready(ready)
