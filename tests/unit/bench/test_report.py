"""Numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from splitserve.bench.record import RequestRecord
from splitserve.bench.report import Distribution, Limits, render, summarize


def record(
    times: list[float], counts: list[int] | None = None, sent: float = 0.0, error: str | None = None
) -> RequestRecord:
    return RequestRecord(
        id="x",
        prompt_tokens=10,
        sent_s=sent,
        ended_s=times[-1] if times else sent + 1,
        token_times_s=times,
        token_counts=counts or [1] * len(times),
        error=error,
    )


def test_percentiles_are_interpolated_linearly():
    found = Distribution.of_seconds([i / 1000 for i in range(1, 102)])
    assert found is not None
    assert (found.count, found.max) == (101, pytest.approx(101))
    assert (found.p50, found.p90, found.p99) == pytest.approx((51, 91, 100))
    assert found.mean == pytest.approx(51)
    two = Distribution.of_seconds([0.0, 0.010])
    assert two is not None
    assert (two.p50, two.p90, two.p99) == pytest.approx((5, 9, 9.9))


def test_one_sample_is_every_percentile_and_none_is_none():
    one = Distribution.of_seconds([0.25])
    assert one == Distribution(1, 250.0, 250.0, 250.0, 250.0, 250.0)
    assert Distribution.of_seconds([]) is None


def test_inter_token_latency_has_one_sample_a_message():
    seen = record([1.0, 1.5, 1.75], counts=[1, 4, 1], sent=0.5)
    assert seen.ttft_s == 0.5
    assert seen.itl_s == [0.5, 0.25]
    assert seen.output_tokens == 6
    assert seen.tpot_s == pytest.approx(0.75 / 5)
    assert seen.e2e_s == 1.25


def test_a_single_token_has_no_time_between_tokens():
    seen = record([1.0])
    assert seen.itl_s == []
    assert seen.tpot_s is None


def test_sums_and_rates():
    report = summarize(
        [
            record([1.0, 2.0], counts=[1, 3]),
            record([3.0, 4.0], sent=2.0),
            record([], sent=0.0, error="UNAVAILABLE: gone"),
        ],
        Limits(),
    )
    assert (report.completed, report.failed) == (2, 1)
    assert report.duration_s == 4.0
    assert (report.prompt_tokens, report.output_tokens) == (20, 6)
    assert (report.requests_per_s, report.output_tokens_per_s) == (0.5, 1.5)
    assert report.ttft_ms is not None
    assert report.ttft_ms.p50 == pytest.approx(1000)
    assert report.errors == {"UNAVAILABLE: gone": 1}


def test_goodput_needs_both_limits_and_counts_failures_as_bad():
    records = [
        record([0.1, 0.2, 0.3]),
        record([0.5, 0.6, 0.7]),
        record([0.1, 0.2, 0.9]),
        record([], error="gone"),
    ]
    goodput = summarize(records, Limits(ttft_ms=200, itl_ms=150)).goodput
    assert goodput.share == 0.25
    assert goodput.requests_per_s == pytest.approx(1.0)
    assert summarize(records, Limits(ttft_ms=200)).goodput.share == 0.5
    assert summarize(records, Limits(itl_ms=150)).goodput.share == 0.5
    assert summarize(records, Limits()).goodput.share == 0.75


def test_the_table_says_it_all_even_of_failures_only():
    text = render(summarize([record([], error="gone")], Limits(ttft_ms=10)))
    assert "0 completed, 1 failed" in text
    assert "0.0% of requests" in text
    assert "TTFT <= 10 ms" in text
    assert "1 x gone" in text
