"""Who computes a prompt that would wait for its prefill worker."""

from __future__ import annotations

from typing import Any, cast

import pytest

from services.router.overflow import Overflow
from services.router.policy import Candidate
from services.router.workers import Claim, Worker
from splitserve.v1 import common_pb2, worker_pb2

BUSY = {"queued_tokens": 500, "prefill_tokens_per_s": 1000.0}
PROMPT = 8


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def worker(**state: Any) -> Worker:
    made = Worker("a", cast(Any, None))
    layout = common_pb2.KvLayout(block_tokens=4)
    sizes = {"free_pages": 100, "max_batch": 8, "max_step_tokens": 4, "kv_layout": layout}
    made.state = worker_pb2.WorkerState(**{**sizes, **state})
    made.rate_told_s = Clock.now
    return made


@pytest.mark.parametrize(
    ("prefill", "decode", "takes"),
    [
        (BUSY, {"prefill_tokens_per_s": 100.0}, True),  # there in 508 ms, here in 80
        (BUSY, {"prefill_tokens_per_s": 100.0, "queued_tokens": 60}, False),  # here in 680
        (BUSY, {}, True),  # nobody knows how fast it is here: it is tried
        (BUSY, {"queued_tokens": 9}, False),  # with one at a time
        (BUSY, {"max_step_tokens": 60}, False),  # in steps of about 60 ms
        (BUSY, {"max_step_tokens": 0}, False),  # nobody knows how long
        (BUSY, {"prefill_tokens_per_s": 100.0, "max_step_tokens": 6}, False),
        (BUSY, {"in_batch": 8}, False),
        (BUSY, {"running": 20, "in_batch": 7}, True),  # those who await their prompts hold no place
        (BUSY, {"free_pages": 2}, False),
        (BUSY, {"running": 7, "free_pages": 9}, False),  # the others may want one each
        ({**BUSY, "queued_tokens": 90}, {}, False),  # it begins in 90 ms
        ({**BUSY, "prefill_tokens_per_s": 0.0}, {}, False),  # nobody knows when it begins
        ({**BUSY, "prefill_tokens_per_s": float("nan")}, {}, False),
    ],
)
def test_the_sooner_one_with_room_and_short_steps(
    prefill: dict[str, Any], decode: dict[str, Any], takes: bool
) -> None:
    overflow = Overflow(0.1, Clock())
    there, here = worker(**prefill), worker(**decode)
    assert overflow.takes(PROMPT, Candidate(there), Candidate(here)) == takes


def test_what_each_has_cached_counts() -> None:
    overflow = Overflow(0.1, Clock())
    there = worker(**BUSY)
    here = worker(prefill_tokens_per_s=1000.0, queued_tokens=494)
    assert overflow.takes(PROMPT, Candidate(there), Candidate(here))
    assert not overflow.takes(PROMPT, Candidate(there, cached_tokens=8), Candidate(here))
    assert overflow.takes(4, Candidate(there, cached_tokens=4), Candidate(here, cached_tokens=4))


def test_prompts_that_no_report_shows_yet_have_their_pages() -> None:
    overflow = Overflow(0.1, Clock())
    there, here = worker(**BUSY), worker(prefill_tokens_per_s=1000.0, free_pages=8)
    for _ in range(2):
        assert overflow.takes(PROMPT, Candidate(there), Candidate(here))
        Claim(here, PROMPT)
    assert not overflow.takes(PROMPT, Candidate(there), Candidate(here))


def test_a_slow_worker_is_tried_again_after_a_while() -> None:
    clock = Clock()
    overflow = Overflow(0.1, clock)
    there = worker(**BUSY)
    slow = worker(prefill_tokens_per_s=10.0, max_step_tokens=1)
    slow.rate_told_s = clock.now
    clock.now += 29
    assert not overflow.takes(PROMPT, Candidate(there), Candidate(slow))
    clock.now += 2
    assert overflow.takes(PROMPT, Candidate(there), Candidate(slow))


def test_a_claim_ends_once() -> None:
    here = worker()
    claim = Claim(here, 5)
    assert (here.own_requests, here.own_tokens) == (1, 5)
    for _ in range(2):
        claim.computed()
        assert (here.own_requests, here.own_tokens) == (1, 0)
    for _ in range(2):
        claim.end()
        assert (here.own_requests, here.own_tokens) == (0, 0)
