from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from splitserve.obs.metrics import Metrics


def _value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"splitserve_{name}", labels)


def test_two_in_one_process_do_not_meet() -> None:
    first, second = Metrics(model_name="a"), Metrics(model_name="b")
    first.num_requests_running.set(3)
    assert _value(first, "num_requests_running", model_name="a") == 3
    assert _value(second, "num_requests_running", model_name="b") == 0


def test_names_that_dashboards_read() -> None:
    metrics = Metrics(model_name="m")
    metrics.num_preemptions.inc()
    metrics.prompt_tokens.inc(5)
    metrics.generation_tokens.inc(7)
    metrics.prefix_cache_queries.inc(8)
    metrics.prefix_cache_hits.inc(4)
    metrics.time_to_first_token_seconds.observe(0.05)
    metrics.request_succeeded("stop")
    metrics.request_failed("CANCELLED")
    metrics.kvstore_blocks.labels("held").set(2)
    for name, value in {
        "num_preemptions_total": 1,
        "prompt_tokens_total": 5,
        "generation_tokens_total": 7,
        "prefix_cache_queries_total": 8,
        "prefix_cache_hits_total": 4,
        "time_to_first_token_seconds_count": 1,
        "kv_cache_usage_perc": 0,
        "num_requests_waiting": 0,
    }.items():
        assert _value(metrics, name, model_name="m") == value, name
    assert _value(metrics, "request_success_total", model_name="m", finished_reason="stop") == 1
    assert _value(metrics, "request_failures_total", model_name="m", code="CANCELLED") == 1
    assert _value(metrics, "kvstore_blocks", state="held") == 2


@pytest.mark.parametrize(
    "stem",
    [
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ],
)
def test_latencies_are_histograms(stem: str) -> None:
    metrics = Metrics(model_name="m")
    getattr(metrics, stem).observe(0.02)
    assert _value(metrics, f"{stem}_bucket", model_name="m", le="0.02") == 1
    assert _value(metrics, f"{stem}_sum", model_name="m") == 0.02


@pytest.mark.parametrize("seconds", [0.0, 0.0075, 0.0076, 10.0, 11.0])
def test_many_of_a_value_are_as_one_after_the_other(seconds: float) -> None:
    one, many = Metrics(model_name="m"), Metrics(model_name="m")
    for _ in range(3):
        one.inter_token_latency_seconds.observe(seconds)
    many.inter_token_latency_seconds.observe_many(seconds, 3)
    shown = [generate_latest(metrics.registry).decode().splitlines() for metrics in (one, many)]
    first, second = ([line for line in text if "_created" not in line] for text in shown)
    assert first == second
