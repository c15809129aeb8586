"""What is learnt of steps and launches, with clocks that are set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.engine.flights import Flight
from splitserve.engine.scheduler import Chunk
from splitserve.engine.sequence import Sequence
from splitserve.engine.step_timing import Estimate, StepTiming
from splitserve.sampling import SamplingParams


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def flight(began_s: float, *sizes: int) -> Flight:
    sequence = Sequence("a", [1], SamplingParams(), seed=0)
    return Flight([Chunk(sequence, 0, size, True) for size in sizes], began_s, None)  # type: ignore[arg-type]


def known(sequences: int, seconds: float, clock: Clock) -> StepTiming:
    timing = StepTiming(512, clock)
    for _ in range(99):
        timing.took(0, sequences, seconds)
    return timing


def test_a_size_that_is_not_known_is_not_waited_for() -> None:
    timing = known(8, 0.009, Clock())
    assert timing.launch_at(flight(99.0, *[1] * 8)) == pytest.approx(99.009)
    assert timing.launch_at(flight(99.0, *[1] * 16)) <= 99.0
    assert timing.launch_at(flight(99.0, *[1] * 7, 64)) <= 99.0
    timing.took(64, 8, 0.02)
    assert timing.launch_at(flight(99.0, *[1] * 7, 64)) <= 99.0, "was seen once"


def test_prompts_of_a_size_that_is_not_known_take_as_long_as_others() -> None:
    clock = Clock()
    timing = StepTiming(512, clock)
    timing.landed(flight(99.0, 512))
    assert timing.prefill_tokens_per_s == pytest.approx(512)
    assert timing.launch_at(flight(100.0, 300)) == pytest.approx(100.0 + 0.9 * 300 / 512)
    assert timing.launch_at(flight(100.0, 300, 1)) == 100.0, "who knows how long that takes"
    for _ in range(3):
        timing.took(300, 1, 0.2)
    assert timing.launch_at(flight(100.0, 300)) == pytest.approx(100.0 + 0.9 * 300 / 512)
    for _ in range(99):
        timing.took(300, 1, 0.2)
    assert timing.launch_at(flight(100.0, 300)) == pytest.approx(100.2), "now it is known"


def test_a_step_that_failed_has_ended_all_the_same() -> None:
    clock = Clock()
    timing = known(1, 0.01, clock)
    clock.now = 101.0
    timing.failed()
    assert timing.launch_at(flight(99.0, 1)) == pytest.approx(101.01)


def test_a_step_begins_when_the_one_before_has_ended() -> None:
    clock = Clock()
    timing = known(1, 0.01, clock)
    timing.landed(flight(99.99, 1))
    clock.now = 100.01
    timing.landed(flight(99.995, 1))
    assert timing.launch_at(flight(100.009, 1)) == pytest.approx(100.02)
    assert timing.launch_at(flight(100.012, 1)) == pytest.approx(100.022)


def test_prompts_tell_the_rate() -> None:
    clock = Clock()
    timing = StepTiming(512, clock)
    timing.landed(flight(99.5, 512))
    assert timing.prefill_tokens_per_s == pytest.approx(1024)
    timing.landed(flight(99.5, *[1] * 300))
    assert timing.prefill_tokens_per_s == pytest.approx(1024)


@given(st.lists(st.floats(0.0001, 0.05), min_size=1, max_size=40))
def test_an_estimate_is_about_what_was_measured(took: list[float]) -> None:
    estimate = Estimate(took[0])
    assert estimate.low == 0
    for seconds in took:
        estimate.add(seconds)
    assert 0 <= estimate.low <= max(took)
    assert min(took) <= estimate.high <= 3 * max(took)


def test_a_steady_host_needs_no_more_than_it_takes() -> None:
    clock = Clock()
    timing = known(1, 0.01, clock)
    for _ in range(99):
        timing.launched(clock.now - 0.002)
    assert timing.launch_at(flight(99.0, 1)) == pytest.approx(99.008)
    timing.launched(clock.now - 0.010)
    assert timing.launch_at(flight(99.0, 1)) == pytest.approx(99.003)


def test_steps_that_vary_are_followed_sooner() -> None:
    timing = known(1, 0.01, Clock())
    timing.took(0, 1, 0.012)
    assert timing.launch_at(flight(99.0, 1)) == pytest.approx(99.00925)
