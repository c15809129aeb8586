"""The spans of both tiers, received over real OTLP, for requests that end well and do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from splitserve.kv.control import StoreControl
from splitserve.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
PROMPT = [(3 * i + 1) % 997 for i in range(100)]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that it is sent, with the service that sent it."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, trace_pb2.Span]] = []
        self.changed = asyncio.Condition()

    async def Export(self, request, context):
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(attributes["service.name"], span) for span in scope.spans]
        async with self.changed:
            self.changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def find(self, service: str, name: str) -> trace_pb2.Span | None:
        found = [span for tier, span in self.spans if (tier, span.name) == (service, name)]
        return found[0] if found else None

    async def wait(self, service: str, name: str) -> trace_pb2.Span:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: self.find(service, name) is not None)
        span = self.find(service, name)
        assert span is not None
        assert span.trace_id.hex() == TRACE_ID
        return span


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    server = grpc.aio.server()
    service = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"http://127.0.0.1:{port}"
    await server.stop(None)


def attributes_of(span: trace_pb2.Span) -> dict[str, object]:
    return {
        a.key: a.value.string_value if a.value.HasField("string_value") else a.value.int_value
        for a in span.attributes
    }


async def test_a_request_is_traced_through_both_tiers(suite, attach, collector):
    spans, endpoint = collector
    store = await suite.kvstore()
    flags = ("--otlp-endpoint", endpoint)
    prefill, decode = await asyncio.gather(
        suite.prefill(store, *flags), suite.decode(store, *flags)
    )
    control = StoreControl(store.address)
    lease = (await control.grant_lease("test", 10_000)).to_proto()
    router = attach(decode)
    trace = {"traceparent": PARENT}
    await router.submit("a", PROMPT, lease=lease, trace_context=trace)
    async with prefill.channel() as channel:
        answer = await prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(
            prefill_pb2.PrefillRequest(
                request_id="a",
                prompt_token_ids=PROMPT,
                sampling=common_pb2.SamplingParams(temperature=0, max_tokens=8, seed=7),
                lease=lease,
            ),
            timeout=10,
            metadata=list(trace.items()),
        )
    await router.start("a", [answer.first_tokens[0].token.id])
    await router.result("a")
    await control.close()

    computed = await spans.wait("prefill", "prefill")
    assert attributes_of(computed)["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert [event.name for event in computed.events] == ["first_token"]
    written = await spans.wait("prefill", "kv.write")
    assert attributes_of(written)["splitserve.kv.blocks"] == 7
    assert attributes_of(written)["splitserve.kv.bytes"] == 7 * 512
    read = await spans.wait("decode", "kv.read")
    assert attributes_of(read)["splitserve.kv.blocks"] == 7
    decoded = await spans.wait("decode", "decode")
    assert attributes_of(decoded)["gen_ai.usage.output_tokens"] == 7
    assert attributes_of(decoded)["splitserve.cached_tokens"] == len(PROMPT)
    assert decoded.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    for service in ("prefill", "decode"):
        queued = await spans.wait(service, "queue")
        assert queued.start_time_unix_nano <= queued.end_time_unix_nano
        assert attributes_of(queued)["splitserve.request.id"] == "a"


async def test_a_cancelled_request_is_an_error_in_its_trace(suite, attach, collector):
    spans, endpoint = collector
    decode = await suite.decode("127.0.0.1:1", "--otlp-endpoint", endpoint, "--fake-step-ms", "10")
    router = attach(decode)
    await router.submit("a", PROMPT, max_tokens=1000, trace_context={"traceparent": PARENT})
    await router.until(lambda: len(router.choice("a").tokens) >= 3)
    await router.cancel("a")
    decoded = await spans.wait("decode", "decode")
    assert decoded.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes_of(decoded)["rpc.response.status_code"] == "CANCELLED"
    assert attributes_of(decoded)["gen_ai.usage.output_tokens"] >= 3
    assert [event.name for event in decoded.events] == ["first_token"]
