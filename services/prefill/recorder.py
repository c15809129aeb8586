"""Turns what happened to a prompt into spans and metrics, once it has ended."""

from __future__ import annotations

import time
from typing import TypeAlias

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode

from services.prefill.hand_over import HandOverStats
from splitserve.engine.sequence import Sequence
from splitserve.obs import names
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing
from splitserve.worker.block_loader import LoadStats

Attributes: TypeAlias = dict[str, str | int | float]

_NS = 1e9


class Recorder:
    """Spans `queue`, `kv.read`, `prefill` and `kv.write`, children of the call's span."""

    def __init__(self, tracing: Tracing, metrics: Metrics, worker_id: str) -> None:
        self._tracing = tracing
        self._metrics = metrics
        self._worker_id = worker_id

    def ended(
        self,
        request_id: str,
        sequence: Sequence,
        parent: Context,
        code: grpc.StatusCode,
        load: LoadStats | None,
        hand_over: HandOverStats | None,
    ) -> None:
        """Book one prompt. `code` is OK if its first tokens were drawn."""
        ended = sequence.first_token_ns or time.time_ns()
        scheduled = sequence.scheduled_ns or ended
        status = None if code is grpc.StatusCode.OK else Status(StatusCode.ERROR, code.name)
        common: Attributes = {
            names.REQUEST_ID: request_id,
            names.WORKER_ID: self._worker_id,
        }
        span = self._tracing.record_span
        span(names.SPAN_QUEUE, sequence.submitted_ns, scheduled, parent, common)
        if load and load.began_ns:
            blocks: Attributes = {
                names.KV_BLOCKS: load.num_blocks,
                names.KV_BYTES: load.num_bytes,
                names.KV_BUSY_MS: load.busy_ns / 1e6,
                names.KV_TRANSPORT: load.transport,
            }
            load_ended = load.ended_ns or time.time_ns()
            span(names.SPAN_KV_READ, load.began_ns, load_ended, parent, common | blocks)
        if sequence.scheduled_ns:
            began = min(ended, max(scheduled, load.ended_ns if load else 0))
            tokens: Attributes = {
                names.GEN_AI_USAGE_INPUT_TOKENS: len(sequence.prompt),
                names.CACHED_TOKENS: sequence.num_cached,
                names.COMPUTED_TOKENS: max(0, sequence.num_computed - sequence.num_cached),
                names.RPC_STATUS_CODE: code.name,
            }
            events = [(names.EVENT_FIRST_TOKEN, ended)] if status is None else []
            span(names.SPAN_PREFILL, began, ended, parent, common | tokens, status, events=events)
        if hand_over and hand_over.began_ns:
            self._record_hand_over(hand_over, parent, common, code)
        self._count(sequence, code, scheduled, ended)

    def _record_hand_over(
        self,
        stats: HandOverStats,
        parent: Context,
        common: Attributes,
        code: grpc.StatusCode,
    ) -> None:
        status = None
        if stats.error:
            status = Status(StatusCode.ERROR, stats.error.code.name)
        elif code is not grpc.StatusCode.OK:
            status = Status(StatusCode.ERROR, code.name)
        blocks: Attributes = {
            names.KV_BLOCKS: stats.num_blocks,
            names.KV_BYTES: stats.num_bytes,
            names.KV_BUSY_MS: stats.busy_ns / 1e6,
            names.KV_TRANSPORT: stats.transport,
            names.KV_LEASE_ID: stats.lease_id,
        }
        attributes = common | blocks
        self._tracing.record_span(
            names.SPAN_KV_WRITE,
            stats.began_ns,
            stats.ended_ns,
            parent,
            attributes,
            status,
            events=[(names.EVENT_FIRST_LAYERS, stats.first_ns)] if stats.first_ns else [],
        )

    def _count(self, sequence: Sequence, code: grpc.StatusCode, scheduled: int, ended: int) -> None:
        metrics = self._metrics
        metrics.request_queue_time_seconds.observe((scheduled - sequence.submitted_ns) / _NS)
        if code is not grpc.StatusCode.OK:
            metrics.request_failed(code.name)
            return
        metrics.request_prefill_time_seconds.observe((ended - scheduled) / _NS)
        metrics.request_prompt_tokens.observe(len(sequence.prompt))
        metrics.prompt_tokens.inc(len(sequence.prompt))
        metrics.prefix_cache_queries.inc(len(sequence.prompt))
        metrics.prefix_cache_hits.inc(sequence.num_cached)
