"""The spans of one request on the router."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from splitserve.obs import names
from splitserve.obs.tracing import Tracing, extract

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider.get_tracer("test"), provider)


async def spans_of(suite: Any, exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The finished spans of our trace, once the server's own is among them."""

    def mine() -> dict[str, ReadableSpan]:
        return {
            span.name: span
            for span in exporter.get_finished_spans()
            if span.context and format(span.context.trace_id, "032x") == TRACE_ID
        }

    await suite.until(lambda: "splitserve.v1.InferenceService/Generate" in mine())
    return mine()


async def test_spans_of_a_request(
    start_suite: Any, tools: Any, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    suite = await start_suite(tracing=tracing)
    call = suite.stub.Generate(
        tools.make_request(max_tokens=4, request_id="mine", seed=5),
        metadata=[("traceparent", TRACEPARENT)],
        timeout=10,
    )
    await tools.rest_of(call)
    spans = await spans_of(suite, exporter)
    server = spans["splitserve.v1.InferenceService/Generate"]
    for name in (names.SPAN_TOKENIZE, names.SPAN_QUEUE, names.SPAN_PLAN, names.SPAN_DECODE):
        assert spans[name].parent is not None
        assert spans[name].parent.span_id == server.context.span_id
    decode = spans[names.SPAN_DECODE]
    prefill = spans["splitserve.v1.PrefillService/Prefill"]
    assert prefill.parent is not None
    assert prefill.parent.span_id == decode.context.span_id
    assert [event.name for event in server.events] == [names.EVENT_FIRST_TOKEN]
    attributes = server.attributes or {}
    assert attributes[names.REQUEST_ID] == "mine"
    assert attributes[names.GEN_AI_USAGE_INPUT_TOKENS] == 8
    assert attributes[names.GEN_AI_USAGE_OUTPUT_TOKENS] == 4
    assert attributes[names.GEN_AI_RESPONSE_FINISH_REASONS] == ("length",)
    assert attributes[names.GEN_AI_LATENCY_TTFT] > 0
    submitted = extract(dict(suite.decode.submits[0].trace_context))
    (parent,) = submitted.values()
    assert parent.get_span_context().span_id == decode.context.span_id


async def test_canary_leaves_no_spans(
    start_suite: Any, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    suite = await start_suite(tracing=tracing)
    assert suite.router.readiness.ready
    assert exporter.get_finished_spans() == ()


async def test_cancelled_request_has_its_spans(
    start_suite: Any, tools: Any, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    suite = await start_suite(tracing=tracing)
    suite.decode.hold_at = 2
    call = suite.stub.Generate(
        tools.make_request(max_tokens=4), metadata=[("traceparent", TRACEPARENT)], timeout=10
    )
    await call.read()
    call.cancel()
    spans = await spans_of(suite, exporter)
    server = spans["splitserve.v1.InferenceService/Generate"]
    assert (server.attributes or {})[names.RPC_STATUS_CODE] == "CANCELLED"
    assert [event.name for event in server.events] == [names.EVENT_FIRST_TOKEN]
    assert names.SPAN_DECODE in spans
    await suite.assert_nothing_left()
