"""Bounds hold, places are handed on in order, and the time to retry follows the measured rate."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission import (
    FIRST_RETRY_S,
    MAX_RETRY_S,
    MIN_RETRY_S,
    Admission,
    ServiceRate,
    Ticket,
)
from splitserve.errors import Overloaded


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_is_the_one_that_was_served() -> None:
    clock = Clock()
    rate = ServiceRate(clock)
    assert rate.seconds_for(5) == FIRST_RETRY_S
    for _ in range(1000):
        clock.now += 0.1
        rate.add(2)
    assert rate.seconds_for(20) == pytest.approx(1.0, rel=0.05)
    assert rate.seconds_for(1e9) == MAX_RETRY_S
    assert rate.seconds_for(0.001) == MIN_RETRY_S


async def test_places_are_handed_on_in_order() -> None:
    admission = Admission(max_running=1, max_waiting=2, max_queued_tokens=100)
    first = await admission.admit(1)
    order: list[int] = []

    async def wait(number: int) -> Ticket:
        ticket = await admission.admit(1)
        order.append(number)
        return ticket

    second, third = asyncio.create_task(wait(2)), asyncio.create_task(wait(3))
    await asyncio.sleep(0)
    assert (admission.running, admission.waiting) == (1, 2)
    with pytest.raises(Overloaded) as refused:
        await admission.admit(1)
    assert refused.value.retry_after_s == FIRST_RETRY_S
    first.release()
    (await second).release()
    (await third).release()
    assert order == [2, 3]
    assert (admission.running, admission.waiting, admission.queued_tokens) == (0, 0, 0)


async def test_first_token_frees_the_queue_but_not_the_place() -> None:
    admission = Admission(max_running=5, max_waiting=0, max_queued_tokens=10)
    ticket = await admission.admit(8)
    with pytest.raises(Overloaded):
        await admission.admit(3)
    ticket.first_token()
    ticket.first_token()
    assert (admission.running, admission.queued_tokens) == (1, 0)
    other = await admission.admit(3)
    for _ in range(2):
        ticket.release()
        other.release()
    assert (admission.running, admission.queued_tokens) == (0, 0)


async def test_a_long_prompt_is_let_in_alone() -> None:
    admission = Admission(max_running=5, max_waiting=0, max_queued_tokens=10)
    ticket = await admission.admit(50)
    with pytest.raises(Overloaded):
        await admission.admit(1)
    with pytest.raises(Overloaded):
        admission.refuse_if_full()
    ticket.release()
    (await admission.admit(1)).release()


async def test_cancelled_just_when_its_turn_came() -> None:
    admission = Admission(max_running=1, max_waiting=5, max_queued_tokens=10)
    first = await admission.admit(1)
    second = asyncio.create_task(admission.admit(1))
    third = asyncio.create_task(admission.admit(1))
    await asyncio.sleep(0)
    first.release()
    second.cancel()
    (await third).release()
    assert second.cancelled()
    assert (admission.running, admission.waiting, admission.queued_tokens) == (0, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("asfrc"), st.integers(0, 9), st.integers(1, 20))))
def test_counts_stay_within_bounds(script: list[tuple[str, int, int]]) -> None:
    async def play() -> None:
        admission = Admission(max_running=3, max_waiting=2, max_queued_tokens=30)
        tasks: list[asyncio.Task[Ticket]] = []
        for verb, which, tokens in script:
            if verb == "a":
                tasks.append(asyncio.create_task(admission.admit(tokens)))
            elif verb == "s":
                await asyncio.sleep(0)
            elif tasks:
                task = tasks[which % len(tasks)]
                if verb == "c":
                    task.cancel()
                elif task.done() and not task.cancelled() and not task.exception():
                    ticket = task.result()
                    ticket.release() if verb == "r" else ticket.first_token()
            assert admission.running <= 3
            assert admission.waiting <= 2
            assert admission.queued_tokens >= 0
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Ticket):
                result.release()
        assert (admission.running, admission.waiting, admission.queued_tokens) == (0, 0, 0)

    asyncio.run(play())
