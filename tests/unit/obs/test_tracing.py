from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from splitserve.obs.collector import Collector
from splitserve.obs.tracing import (
    Tracing,
    extract,
    extract_metadata,
    inject,
    setup_tracing,
    trace_context,
)

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.mark.parametrize("endpoint", [None, ""])
def test_off_starts_no_thread_and_passes_contexts_on(endpoint: str | None) -> None:
    threads = threading.active_count()
    tracing = setup_tracing("service", endpoint)
    assert threading.active_count() == threads
    carrier: dict[str, str] = {}
    parent = extract({"traceparent": TRACEPARENT})
    with tracing.tracer.start_as_current_span("work", context=parent):
        inject(carrier)
    assert carrier["traceparent"] == TRACEPARENT
    tracing.record_span("late", 1, 2, parent)
    tracing.shutdown()


def test_spans_arrive_with_service_and_attributes(collector: Collector) -> None:
    tracing = setup_tracing("decode", collector.endpoint, instance_id="w-1", of_process=False)
    with tracing.tracer.start_as_current_span("outer", attributes={"n": 3, "xs": ["a"]}) as outer:
        outer.add_event("first_token")
        with tracing.tracer.start_as_current_span("inner"):
            carried = trace_context()
    tracing.shutdown()
    spans = {span.name: span for span in collector.spans()}
    assert spans["outer"].service == "decode"
    assert spans["outer"].attributes == {"n": 3, "xs": ["a"]}
    assert [event.name for event in spans["outer"].events] == ["first_token"]
    assert spans["outer"].parent_id is None
    assert spans["inner"].parent_id == spans["outer"].span_id
    assert carried["traceparent"].split("-")[1] == spans["inner"].trace_id


def test_recorded_span_has_the_times_it_was_given(collector: Collector) -> None:
    tracing = setup_tracing("router", collector.endpoint, of_process=False)
    start_ns = 1_700_000_000_000_000_000
    tracing.record_span(
        "queue",
        start_ns,
        start_ns + 5_000_000,
        extract({"traceparent": TRACEPARENT}),
        {"splitserve.batch_size": 4},
        Status(StatusCode.ERROR, "lost"),
        events=[("preempted", start_ns + 1)],
    )
    tracing.record_span("backwards", start_ns, start_ns - 1)
    tracing.shutdown()
    spans = {span.name: span for span in collector.spans()}
    queue = spans["queue"]
    assert (queue.start_ns, queue.duration_ms) == (start_ns, 5.0)
    assert queue.trace_id == TRACEPARENT.split("-")[1]
    assert queue.parent_id == TRACEPARENT.split("-")[2]
    assert (queue.status, queue.status_message) == ("ERROR", "lost")
    assert queue.events[0].time_ns == start_ns + 1
    assert spans["backwards"].duration_ms == 0


@pytest.mark.parametrize(
    "carrier", [{}, {"traceparent": ""}, {"traceparent": "00-zz-zz-01"}, {"tracestate": "a=b"}]
)
def test_malformed_context_is_no_context(carrier: dict[str, str]) -> None:
    span = trace.get_current_span(extract(carrier)).get_span_context()
    assert not span.is_valid


def test_metadata_may_hold_anything() -> None:
    context = extract_metadata(
        [("x-bin", b"\xff"), ("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)]
    )
    assert trace.get_current_span(context).get_span_context().is_valid
    assert not trace.get_current_span(extract_metadata(None)).get_span_context().is_valid


def test_unreachable_collector_neither_slows_nor_spams(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        tracing = setup_tracing("service", endpoint, of_process=False)
        started = time.monotonic()
        with caplog.at_level(logging.INFO):
            for _ in range(5000):
                with tracing.tracer.start_as_current_span("work"):
                    pass
            worked_s = time.monotonic() - started
            tracing.shutdown(timeout_s=1.0)
            ended_s = time.monotonic() - started - worked_s
    assert worked_s < 3.0
    assert ended_s < 2.0
    assert len(caplog.records) <= 1, [record.getMessage() for record in caplog.records]
    assert "trace-flush" not in {thread.name for thread in threading.enumerate()}


def test_of_process_is_off_until_set_up() -> None:
    tracing = Tracing.of_process()
    with tracing.tracer.start_as_current_span("work") as span:
        assert not span.is_recording()
