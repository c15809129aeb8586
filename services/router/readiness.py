"""Ready means serving: now and then the router generates something through both tiers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from splitserve.errors import SplitserveError

_log = logging.getLogger(__name__)

RETRY_S = 0.25


class Canary(Protocol):
    """A real generation, short."""

    async def __call__(self, timeout_s: float) -> None:
        """Generate; raise what went wrong."""
        ...


class Readiness:
    """Runs the canary every `interval_s`, more often while it fails, and tells `set_ready`."""

    def __init__(
        self,
        canary: Canary,
        set_ready: Callable[[bool], None],
        *,
        interval_s: float,
        timeout_s: float,
    ) -> None:
        self._canary = canary
        self._set_ready = set_ready
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._ready = False
        self._stopped = False

    @property
    def ready(self) -> bool:
        """Whether the last canary succeeded."""
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
                await self._canary(self._timeout_s)
        except TimeoutError:
            return self._failed(f"no answer within {self._timeout_s:g} s")
        except SplitserveError as error:
            return self._failed(error.message)
        except Exception:
            _log.exception("the canary failed")
            return False
        return True

    def _failed(self, reason: str) -> bool:
        if self._ready:
            _log.warning("not ready: %s", reason)
        else:
            _log.debug("not ready yet: %s", reason)
        return False

    def _tell(self, ready: bool) -> None:
        ready = ready and not self._stopped
        if ready and not self._ready:
            _log.info("ready")
        if ready != self._ready:
            self._ready = ready
            self._set_ready(ready)
