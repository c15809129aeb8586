from __future__ import annotations

from dataclasses import replace

import pytest

from splitserve.obs.collector import CollectedSpan, Collector, SpanEvent
from splitserve.obs.tracing import setup_tracing
from splitserve.obs.tree import render_tree


def _span(
    span_id: str, parent_id: str | None, service: str, name: str, start_ms: int, end_ms: int
) -> CollectedSpan:
    return CollectedSpan(
        trace_id="t",
        span_id=span_id,
        parent_id=parent_id,
        name=name,
        service=service,
        kind="INTERNAL",
        start_ns=start_ms * 1_000_000,
        end_ns=end_ms * 1_000_000,
        attributes={},
        events=(),
        status="UNSET",
        status_message="",
    )


def test_wait_for_returns_when_the_predicate_holds() -> None:
    collector = Collector()
    tracing = setup_tracing("service", collector.endpoint, export_delay_s=0.02, of_process=False)
    tracing.record_span("b", 2, 3)
    tracing.record_span("a", 1, 2)
    spans = collector.wait_for(lambda spans: len(spans) == 2)
    assert [span.name for span in spans] == ["a", "b"]
    assert collector.spans(spans[0].trace_id) == [spans[0]]
    tracing.shutdown()
    collector.stop()


def test_wait_for_says_what_did_arrive() -> None:
    collector = Collector()
    with pytest.raises(TimeoutError, match="none"):
        collector.wait_for(lambda spans: bool(spans), timeout_s=0.05)
    collector.stop()


def test_tree_shows_parents_bars_status_and_events() -> None:
    root = _span("1", None, "router", "request", 0, 100)
    spans = [
        replace(
            _span("3", "1", "decode", "decode", 50, 100), status="ERROR", status_message="lost"
        ),
        replace(
            _span("2", "1", "prefill", "splitserve.v1.PrefillService/Prefill", 0, 50),
            kind="CLIENT",
            events=(SpanEvent("first_token", 25_000_000),),
        ),
        root,
        _span("4", "2", "prefill", "prefill.chunk", 10, 20),
    ]
    lines = render_tree(spans).splitlines()
    assert [line.split(" │")[0].rstrip() for line in lines[:1]] == ["router: request"]
    assert lines[1].startswith("├─ prefill: PrefillService/Prefill →")
    assert lines[2].startswith("│  └─ prefill: prefill.chunk")
    assert lines[3].startswith("└─ decode: decode")
    assert "100.00 ms" in lines[0]
    assert "█" * 32 in lines[0]
    assert f"│{'█' * 16}{' ' * 16}│" in lines[1]
    assert lines[1].endswith("first_token +25.0 ms")
    assert lines[3].endswith("lost")


def test_tree_of_spans_without_their_parent() -> None:
    lines = render_tree([_span("2", "gone", "a", "x", 0, 1), _span("3", "gone", "b", "y", 1, 2)])
    assert [line.split()[0] for line in lines.splitlines()] == ["a:", "b:"]
    assert render_tree([]) == "no spans"
