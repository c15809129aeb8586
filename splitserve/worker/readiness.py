"""Whether a worker serves: a real generation has succeeded and the loop goes on.

Ready is not what a process says of itself but what it has just done. A canary sequence runs
through the core at start, and again after a step has failed. A step that takes too long, or
draining, takes readiness away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from splitserve.engine.core import CoreStats, EngineCore
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.errors import SplitserveError
from splitserve.sampling import SamplingParams
from splitserve.worker.relay import OutputRelay, Step

CANARY_ID = "canary"
CANARY_TOKENS = 3
CANARY_RETRY_S = 1.0
CHECK_INTERVAL_S = 0.1

OnReady = Callable[[bool], None]
OnStats = Callable[[CoreStats], None]

_log = logging.getLogger(__name__)


async def run_canary(core: EngineCore, relay: OutputRelay, *, prefill: bool) -> None:
    """Generate a few tokens, or a prefill's first one, through the core.

    Raises:
        SplitserveError: the generation failed.
    """
    ended: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()

    def on_output(_: Step, output: SequenceOutput) -> None:
        last = output.prefill_done or output.finish_reason or output.error
        if last and not ended.done():
            ended.set_result(output)

    sequence = Sequence(
        id=CANARY_ID,
        prompt=[1, 2, 3],
        params=SamplingParams(temperature=0.0, max_tokens=CANARY_TOKENS, ignore_eos=True),
        seed=0,
        cache_salt=b"canary",
        prefill_choices=1 if prefill else 0,
    )
    relay.subscribe(CANARY_ID, on_output)
    try:
        core.submit(sequence)
        output = await ended
    finally:
        relay.unsubscribe(CANARY_ID)
        core.abort(CANARY_ID)
    if output.error:
        raise output.error


class Readiness:
    """Runs the canary, then watches the loop. Tells `on_ready` of each change."""

    def __init__(
        self,
        core: EngineCore,
        relay: OutputRelay,
        *,
        prefill: bool,
        stuck_after_s: float,
        on_ready: OnReady,
        on_stats: OnStats,
    ) -> None:
        self._core = core
        self._relay = relay
        self._prefill = prefill
        self._stuck_after_s = stuck_after_s
        self._on_ready = on_ready
        self._on_stats = on_stats
        self._draining = False
        self._task: asyncio.Task[None] | None = None
        self.ready = False

    def start(self) -> asyncio.Task[None]:
        """Begin with the canary. The task ends only if the watch itself fails."""
        self._task = asyncio.create_task(self._run(), name="readiness")
        return self._task

    async def stop(self) -> None:
        """Stop watching."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def drain(self) -> None:
        """Not ready any more, whatever the loop does."""
        self._draining = True
        self._set(False)

    async def _run(self) -> None:
        await self._pass_canary()
        failed_steps = self._core.stats().failed_steps
        while True:
            stats = self._core.stats()
            self._on_stats(stats)
            if stats.failed_steps != failed_steps:
                self._set(False)
                await self._pass_canary()
                failed_steps = self._core.stats().failed_steps
            self._set(stats.stuck_s < self._stuck_after_s)
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def _pass_canary(self) -> None:
        while True:
            try:
                await run_canary(self._core, self._relay, prefill=self._prefill)
                return
            except SplitserveError as error:
                _log.error("the canary generation failed, trying again: %s", error.message)
                await asyncio.sleep(CANARY_RETRY_S)

    def _set(self, ready: bool) -> None:
        ready = ready and not self._draining
        if ready != self.ready:
            self.ready = ready
            _log.info("ready" if ready else "not ready")
            self._on_ready(ready)
