"""When requests are sent."""

from __future__ import annotations

import pytest

from splitserve.bench.pacing import DEFAULT_CONCURRENCY, choose, closed_loop, open_loop, recorded
from splitserve.bench.workload import WorkItem
from splitserve.errors import ConfigError

PLAIN = [WorkItem("a", 1, 1), WorkItem("b", 1, 1)]
TIMED = [WorkItem("a", 1, 1, 10.0), WorkItem("b", 1, 1, 14.0)]


def test_a_closed_loop_has_everything_due_at_once():
    pacing = closed_loop(3, 2)
    assert pacing.offsets_s == (0.0, 0.0, 0.0)
    assert pacing.concurrency == 2


def test_an_open_loop_has_its_mean_rate_and_is_reproducible():
    pacing = open_loop(5000, rate=20, seed=3)
    assert pacing == open_loop(5000, rate=20, seed=3)
    assert pacing.offsets_s[0] == 0.0
    assert list(pacing.offsets_s) == sorted(pacing.offsets_s)
    assert pacing.offsets_s[-1] / 4999 == pytest.approx(1 / 20, rel=0.05)


def test_recorded_arrivals_start_at_zero_and_scale():
    assert recorded(TIMED, 0.5).offsets_s == (0.0, 2.0)
    with pytest.raises(ConfigError, match="--time-scale"):
        recorded(PLAIN, 1.0)


def test_the_default_is_what_was_recorded_or_else_a_closed_loop():
    def chosen(items: list[WorkItem], **flags: float):
        given = {"rate": None, "concurrency": None, "time_scale": None} | flags
        return choose(items, seed=0, **given)

    assert chosen(TIMED).offsets_s == (0.0, 4.0)
    assert chosen(PLAIN).concurrency == DEFAULT_CONCURRENCY
    assert chosen(TIMED, concurrency=3).concurrency == 3
    assert chosen(TIMED, rate=5.0).description == "Poisson, 5 requests/s"
