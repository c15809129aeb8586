"""When a decode worker computes a prompt that waits too long for its prefill worker."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.router.policy import Candidate
from services.router.workers import Worker

MAX_STEP_S = 0.05
"""Longest step that those who decode may have to wait for, if it is full. On CPUs it is longer."""

RATE_VALID_S = 30.0
"""A rate that no step has changed for so long is not known any more: what made a decode worker slow
may be over, and it would never be tried again.
"""


class Overflow:
    """Expects of both workers when they would have the prompt done.

    A decode worker that is not known to be fast or slow is tried with one prompt at a time.
    """

    def __init__(self, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_wait_s`: so long a prompt may wait before a prefill worker begins with it."""
        self._max_wait_s = max_wait_s
        self._clock = clock

    def takes(self, uncached: int, prefill: Candidate, decode: Candidate) -> bool:
        """Whether the decode worker should compute what it lacks of the prompt, `uncached` tokens.
        Never while it is not known how fast the prefill worker is.
        """
        there, here = prefill.worker, decode.worker
        rate = there.prefill_tokens_per_s
        if not rate or there.queued_tokens / rate <= self._max_wait_s:
            return False
        if not _has_room(here, uncached):
            return False
        own_rate = here.prefill_tokens_per_s
        known = own_rate > 0 and self._clock() - here.rate_told_s < RATE_VALID_S
        if not _keeps_steps_short(here, own_rate if known else rate):
            return False
        if not known:
            return here.queued_tokens == 0
        lacking = uncached + decode.cached_tokens - prefill.cached_tokens
        there_s = (there.queued_tokens + lacking) / rate
        return (here.queued_tokens + uncached) / own_rate < there_s


def _has_room(worker: Worker, uncached: int) -> bool:
    """Whether the prompt would have its place in the batch and its pages at once, as far as reports
    tell and after the prompts that were sent there. Each sequence may want a page more by then.
    """
    state = worker.state
    if state is None or state.in_batch >= state.max_batch:
        return False
    block = max(state.kv_layout.block_tokens, 1)
    wanted = -(-(uncached + worker.own_tokens) // block) + worker.num_requests + 1
    return state.free_pages >= wanted


def _keeps_steps_short(worker: Worker, tokens_per_s: float) -> bool:
    state = worker.state
    most = state.max_step_tokens if state is not None else 0
    return 0 < most <= MAX_STEP_S * tokens_per_s
