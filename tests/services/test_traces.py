"""One trace a request through all four services, as a collector gets it over OTLP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator

import grpc
import pytest

from splitserve.obs import names
from splitserve.obs.collector import CollectedSpan, Collector
from splitserve.v1 import inference_pb2_grpc

from ..load import request
from ..suite import Service, Suite

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
TRACEPARENT = [("traceparent", f"00-{TRACE_ID}-{CLIENT_SPAN}-01")]
PROMPT = [(3 * i + 1) % 997 for i in range(100)]
BLOCKS = 7
GENERATE = "splitserve.v1.InferenceService/Generate"
PREFILL = "splitserve.v1.PrefillService/Prefill"
STORE = "splitserve.v1.KvStoreService"

# (service, span), and the span that it is a child of.
PARENTS = {
    ("router", GENERATE): None,
    ("router", "tokenize"): ("router", GENERATE),
    ("router", "queue"): ("router", GENERATE),
    ("router", "plan"): ("router", GENERATE),
    ("router", "decode"): ("router", GENERATE),
    ("kvstore", f"{STORE}/GrantLease"): ("router", f"{STORE}/GrantLease"),
    ("router", f"{STORE}/GrantLease"): ("router", "plan"),
    ("router", PREFILL): ("router", "decode"),
    ("prefill", PREFILL): ("router", PREFILL),
    ("prefill", "queue"): ("prefill", PREFILL),
    ("prefill", "prefill"): ("prefill", PREFILL),
    ("prefill", "kv.write"): ("prefill", PREFILL),
    ("prefill", f"{STORE}/ReserveBlocks"): ("prefill", PREFILL),
    ("kvstore", f"{STORE}/ReserveBlocks"): ("prefill", f"{STORE}/ReserveBlocks"),
    ("prefill", f"{STORE}/CommitBlocks"): ("prefill", PREFILL),
    ("kvstore", f"{STORE}/CommitBlocks"): ("prefill", f"{STORE}/CommitBlocks"),
    ("decode", "queue"): ("router", "decode"),
    ("decode", "kv.read"): ("router", "decode"),
    ("decode", f"{STORE}/AwaitBlocks"): ("router", "decode"),
    ("kvstore", f"{STORE}/AwaitBlocks"): ("decode", f"{STORE}/AwaitBlocks"),
    ("decode", "decode"): ("router", "decode"),
}


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.stop()


@pytest.fixture
async def router(suite: Suite, collector: Collector) -> Service:
    """A router before one service of each tier, all traced."""
    flags = ("--otlp-endpoint", collector.endpoint, "--log-format", "json")
    store = await suite.kvstore(*flags)
    prefill, decode = await asyncio.gather(
        suite.prefill(store, *flags, "--fake-step-ms", "5"),
        suite.decode(store, *flags, "--fake-step-ms", "5"),
    )
    model = ("--skip-tokenizer-init", "--vocab-size", "1000", "--worker-wait-s", "0.1")
    return await suite.router([prefill], [decode], *model, *flags)


class Trace:
    """The spans of one trace by service and name; of several equal ones the first."""

    def __init__(self, spans: list[CollectedSpan]) -> None:
        self.spans = [span for span in spans if span.trace_id == TRACE_ID]
        self.by_id = {span.span_id: span for span in self.spans}
        self.by_name = {(span.service, span.name): span for span in reversed(self.spans)}

    def __getitem__(self, key: tuple[str, str]) -> CollectedSpan:
        return self.by_name[key]

    def parent(self, key: tuple[str, str]) -> tuple[str, str] | None:
        parent = self.by_id.get(self[key].parent_id or "")
        return (parent.service, parent.name) if parent else None

    def roots(self) -> list[CollectedSpan]:
        return [span for span in self.spans if span.parent_id not in self.by_id]

    def errors(self) -> set[tuple[str, str, str]]:
        return {(s.service, s.name, s.status_message) for s in self.spans if s.status == "ERROR"}


async def trace_of(collector: Collector, complete: Callable[[Trace], bool]) -> Trace:
    """What has been received once `complete` holds of it."""
    spans = await asyncio.to_thread(
        collector.wait_for, lambda arrived: complete(Trace(list(arrived))), 10.0
    )
    return Trace(spans)


async def generate(
    router: Service, count: int, timeout_s: float = 10.0, leave_after: int | None = None
) -> grpc.StatusCode:
    """One request that joins the client's own trace; how it ended."""
    async with router.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request(PROMPT, count), timeout=timeout_s, metadata=TRACEPARENT)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for message in call:
                tokens = message.choices[0].first_token_index + len(message.choices[0].tokens)
                if leave_after is not None and tokens >= leave_after:
                    break
        call.cancel()
        return await call.code()


async def test_one_trace_through_all_services(router: Service, collector: Collector) -> None:
    assert await generate(router, 10) is grpc.StatusCode.OK
    trace = await trace_of(
        collector,
        lambda trace: trace.by_name.keys() >= PARENTS.keys() and len(trace.roots()) == 1,
    )
    assert {key: trace.parent(key) for key in PARENTS} == PARENTS
    assert trace["router", GENERATE].parent_id == CLIENT_SPAN
    assert trace.roots() == [trace["router", GENERATE]]
    # A wait for blocks may be left as soon as all are there, before its end is heard of.
    assert {name for _, name, _ in trace.errors()} <= {f"{STORE}/AwaitBlocks"}
    # Nothing that was done for the request, or by the services themselves, is a trace of its own.
    assert {span.trace_id for span in collector.spans()} == {TRACE_ID}

    for key in (("router", GENERATE), ("prefill", "prefill"), ("decode", "decode")):
        assert [event.name for event in trace[key].events] == ["first_token"], key
    first_ns = trace["router", GENERATE].events[0].time_ns
    assert trace["prefill", "prefill"].end_ns <= first_ns <= trace["decode", "decode"].end_ns
    written, read = trace["prefill", "kv.write"], trace["decode", "kv.read"]
    assert written.attributes[names.KV_BLOCKS] == read.attributes[names.KV_BLOCKS] == BLOCKS
    assert written.attributes[names.KV_LEASE_ID] == read.attributes[names.KV_LEASE_ID]
    usage = trace["router", GENERATE].attributes
    assert usage[names.GEN_AI_USAGE_INPUT_TOKENS] == len(PROMPT)
    assert usage[names.GEN_AI_USAGE_OUTPUT_TOKENS] == 10
    # The first token was drawn by the prefill worker.
    assert trace["decode", "decode"].attributes[names.GEN_AI_USAGE_OUTPUT_TOKENS] == 9


async def test_a_cancelled_request(router: Service, collector: Collector) -> None:
    assert await generate(router, 1000, leave_after=5) is grpc.StatusCode.CANCELLED
    ends = {("router", GENERATE), ("router", "decode"), ("decode", "decode")}
    trace = await trace_of(collector, lambda trace: trace.by_name.keys() >= ends)
    # By convention it is no fault of a server that its client has left.
    server = trace["router", GENERATE]
    assert (server.status, server.attributes[names.RPC_STATUS_CODE]) == ("UNSET", "CANCELLED")
    for tier in ("router", "decode"):
        span = trace[tier, "decode"]
        assert (span.status, span.status_message) == ("ERROR", "CANCELLED")
    assert trace["decode", "decode"].attributes[names.GEN_AI_USAGE_OUTPUT_TOKENS] >= 4


async def test_a_request_whose_deadline_passes(router: Service, collector: Collector) -> None:
    assert await generate(router, 1000, timeout_s=0.6) is grpc.StatusCode.DEADLINE_EXCEEDED
    ends = {("router", GENERATE), ("router", "decode"), ("decode", "decode")}
    trace = await trace_of(collector, lambda trace: trace.by_name.keys() >= ends)
    assert {key for key in ends if trace[key].status == "ERROR"} == ends
    for key in ends - {("router", "decode")}:
        assert trace[key].attributes[names.RPC_STATUS_CODE] == "DEADLINE_EXCEEDED"
        assert [event.name for event in trace[key].events] == ["first_token"]
    assert trace["prefill", "prefill"].status == "UNSET"


async def test_a_request_that_fails_is_found_in_logs_by_its_trace(
    suite: Suite, router: Service, collector: Collector
) -> None:
    [decode] = [service for service in suite.services if service.tier == "decode"]
    asking = asyncio.create_task(generate(router, 1000))
    await decode.until_metric("splitserve_num_requests_running", lambda count: count > 0)
    await suite.kill(decode)
    assert await asking is grpc.StatusCode.UNAVAILABLE
    trace = await trace_of(collector, lambda trace: ("router", GENERATE) in trace.by_name)
    failed = trace["router", GENERATE]
    assert (failed.status, failed.attributes[names.RPC_STATUS_CODE]) == ("ERROR", "UNAVAILABLE")
    assert "worker_lost" in [event.name for event in failed.events]
    lines = [json.loads(line) for line in router.log if line.startswith("{")]
    told = [line["message"] for line in lines if line.get(names.LOG_TRACE_ID) == TRACE_ID]
    assert any("trying again" in message for message in told)
    assert any("a request failed" in message for message in told)
