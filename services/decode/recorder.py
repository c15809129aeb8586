"""Turns what happened to a request into spans and metrics, once it has ended."""

from __future__ import annotations

import time
from collections import Counter

import grpc
from opentelemetry.trace import Status, StatusCode

from services.decode.request import LiveChoice, LiveRequest
from splitserve.engine.sequence import SequenceOutput
from splitserve.obs import names
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing

_NS = 1e9


class Recorder:
    """Spans `queue`, `kv.read` and `decode`, children of the router's span of the request."""

    def __init__(self, tracing: Tracing, metrics: Metrics, worker_id: str) -> None:
        self._tracing = tracing
        self._metrics = metrics
        self._worker_id = worker_id
        self._counted_ns = 0
        self._gaps: Counter[int] = Counter()
        self._num_tokens = 0

    def output(self, choice: LiveChoice, ended_ns: int, output: SequenceOutput) -> None:
        """Book one choice's news of the step that was over at `ended_ns`."""
        request, sequence = choice.request, output.sequence
        if output.tokens:
            if ended_ns != self._counted_ns:
                self._count()
                self._counted_ns = ended_ns
            if choice.last_token_ns:
                self._gaps[ended_ns - choice.last_token_ns] += 1
            choice.last_token_ns = ended_ns
            request.first_token_ns = request.first_token_ns or ended_ns
            request.num_tokens += len(output.tokens)
            self._num_tokens += len(output.tokens)
        request.scheduled_ns = request.scheduled_ns or sequence.scheduled_ns
        if output.finish_reason:
            request.num_preemptions += sequence.num_preemptions
            self._metrics.request_succeeded(output.finish_reason.value)

    def _count(self) -> None:
        """Add the step's tokens to the metrics. Most of them come as long after the one before."""
        for gap_ns, count in self._gaps.items():
            self._metrics.inter_token_latency_seconds.observe_many(gap_ns / _NS, count)
        self._metrics.generation_tokens.inc(self._num_tokens)
        self._gaps.clear()
        self._num_tokens = 0

    def refused(self, code: grpc.StatusCode) -> None:
        """Book a request that was not taken on."""
        self._metrics.request_failed(code.name)

    def ended(self, request: LiveRequest, code: grpc.StatusCode) -> None:
        """Record the request's spans. `code` is OK, CANCELLED, or what it failed with."""
        self._count()
        end = time.time_ns()
        status = None if code is grpc.StatusCode.OK else Status(StatusCode.ERROR, code.name)
        if code is not grpc.StatusCode.OK:
            self._metrics.request_failed(code.name)
        scheduled = request.scheduled_ns or end
        self._metrics.request_queue_time_seconds.observe((scheduled - request.received_ns) / _NS)
        self._span(request, names.SPAN_QUEUE, request.received_ns, scheduled, {}, None)
        self._record_load(request)
        if request.scheduled_ns:
            self._record_decode(request, end, code, status)

    def _record_load(self, request: LiveRequest) -> None:
        if request.loader is None or not request.loader.stats.began_ns:
            return
        stats, lease = request.loader.stats, request.submission.lease
        attributes: dict[str, int | str | float] = {
            names.KV_BLOCKS: stats.num_blocks,
            names.KV_BYTES: stats.num_bytes,
            names.KV_BUSY_MS: stats.busy_ns / 1e6,
            names.KV_TRANSPORT: stats.transport,
            names.KV_LEASE_ID: lease.lease_id if lease else "",
        }
        corrupt = Status(StatusCode.ERROR, "DATA_LOSS") if stats.num_corrupt else None
        ended = stats.ended_ns or time.time_ns()
        self._span(request, names.SPAN_KV_READ, stats.began_ns, ended, attributes, corrupt)

    def _record_decode(
        self, request: LiveRequest, end: int, code: grpc.StatusCode, status: Status | None
    ) -> None:
        first = request.first_token_ns
        began = self._decode_began(request)
        attributes: dict[str, int | str | float] = {
            names.GEN_AI_USAGE_OUTPUT_TOKENS: request.num_tokens,
            names.GEN_AI_USAGE_INPUT_TOKENS: len(request.submission.prompt),
            names.CACHED_TOKENS: request.num_cached,
            names.RPC_STATUS_CODE: code.name,
        }
        if request.num_preemptions:
            attributes[names.EVENT_PREEMPTED] = request.num_preemptions
        events = [(names.EVENT_FIRST_TOKEN, first)] if first else []
        self._span(request, names.SPAN_DECODE, began, end, attributes, status, events)
        if first:
            self._metrics.request_decode_time_seconds.observe((end - first) / _NS)
            self._metrics.request_generation_tokens.observe(request.num_tokens)

    def _decode_began(self, request: LiveRequest) -> int:
        """When the sequence had its pages and its KV."""
        loaded = request.loader.stats.ended_ns if request.loader else 0
        return max(request.scheduled_ns, loaded)

    def _span(
        self,
        request: LiveRequest,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, int | str | float],
        status: Status | None,
        events: list[tuple[str, int]] | None = None,
    ) -> None:
        self._tracing.record_span(
            name,
            start_ns,
            end_ns,
            parent=request.submission.parent,
            attributes={
                names.REQUEST_ID: request.request_id,
                names.WORKER_ID: self._worker_id,
                **attributes,
            },
            status=status,
            events=events or (),
        )
