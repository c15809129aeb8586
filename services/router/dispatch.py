"""A request's way through the tiers, from the plan to its last token.

1. Plan: choose workers, look up what is cached, get a lease.
2. Submit to the decode worker, which sets pages aside and waits for the KV.
3. At the same time call the prefill worker, which writes KV to the store under the lease.
4. Its answer holds the first tokens: they go to the client at once, and to the decode worker.
5. Tokens come from the decode worker's stream until every choice has ended.
6. Whatever happened, the decode worker is left, the prefill call ended, the lease released.

A failure that another worker might not have is tried again: from step 1 before the first token,
and from there on with the output so far, which a decode worker recomputes and goes on from.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import grpc
from opentelemetry import trace

from services.router.decode_client import DecodeLinks
from services.router.planner import Plan, Planner
from services.router.prefill_client import prefill
from services.router.request import Request
from services.router.session import DecodeSession
from services.router.stream import OutputStream, SlowClient
from splitserve import wire
from splitserve.errors import (
    BlockCorrupt,
    BlockNotFound,
    LeaseEnded,
    NoWorker,
    Overloaded,
    RequestCancelled,
    SplitserveError,
    Unavailable,
    WorkerLost,
)
from splitserve.obs import names
from splitserve.obs.metrics import Metrics
from splitserve.obs.tracing import Tracing, trace_context
from splitserve.v1 import decode_pb2, prefill_pb2

_log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.02
BACKOFF_MAX_S = 1.0

RETRY_AFTER_S = 1.0
"""What a client is told where an overloaded worker did not say when to come back."""

# What the worker or its tier could not do, rather than what the request may not ask.
_INNER = (LeaseEnded, BlockCorrupt, BlockNotFound, RequestCancelled)
_RETRIED = (Unavailable, Overloaded, *_INNER)
_FINAL = (NoWorker, SlowClient)


class Dispatcher:
    """Takes requests through the tiers, with at most `max_attempts` tries each."""

    def __init__(
        self,
        planner: Planner,
        links: DecodeLinks,
        tracing: Tracing,
        metrics: Metrics,
        *,
        max_attempts: int,
    ) -> None:
        self._planner = planner
        self._links = links
        self._tracing = tracing
        self._metrics = metrics
        self._max_attempts = max_attempts

    async def run(
        self, request: Request, stream: OutputStream, *, always_split: bool = False
    ) -> bool:
        """Fill `stream` to its end. Raises what ended it early; everything is then freed.

        Returns whether the last attempt went through the prefill tier; with `always_split` it
        does whatever the prompt's length, if that tier is in service.
        """
        avoid: set[str] = set()
        for attempt in range(self._max_attempts):
            name = f"{request.key}.{attempt}"
            try:
                return await self._attempt(request, name, stream, avoid, always_split)
            except _RETRIED as error:
                last = attempt == self._max_attempts - 1
                if isinstance(error, _FINAL) or last:
                    raise _for_client(error) from error
                _log.info("attempt %s failed, trying again: %s", name, error.message)
                trace.get_current_span().add_event(
                    names.EVENT_WORKER_LOST, {names.ERROR_TYPE: type(error).__name__}
                )
            if stream.finished:
                break
            await asyncio.sleep(_backoff_s(attempt, request))
        return False

    async def _attempt(
        self,
        request: Request,
        name: str,
        stream: OutputStream,
        avoid: set[str],
        always_split: bool,
    ) -> bool:
        plan = await self._plan(request, stream, avoid, always_split)
        try:
            await self._carry_out(plan, request, name, stream, avoid)
        finally:
            plan.close()
        return plan.hand_over is not None

    async def _plan(
        self, request: Request, stream: OutputStream, avoid: set[str], always_split: bool
    ) -> Plan:
        with self._tracing.tracer.start_as_current_span(names.SPAN_PLAN) as span:
            if stream.started:
                span.add_event(names.EVENT_RESUMED)
                plan = await self._planner.plan_resume(request, stream.model_fingerprint, avoid)
            else:
                plan = await self._planner.plan(request, avoid, always_split=always_split)
                stream.model_fingerprint = plan.model_fingerprint
            span.set_attribute(names.DECODE_WORKER, plan.decode.id)
            if plan.hand_over is not None:
                span.set_attribute(names.PREFILL_WORKER, plan.hand_over.prefill.id)
            span.set_attribute(names.ROUTE, plan.route)
            self._metrics.router_plans.labels(plan.route).inc()
            return plan

    async def _carry_out(
        self, plan: Plan, request: Request, name: str, stream: OutputStream, avoid: set[str]
    ) -> None:
        link = self._links.to(plan.decode)
        session = DecodeSession(link, name, stream, plan.joined)
        with self._tracing.tracer.start_as_current_span(names.SPAN_DECODE) as span:
            span.set_attribute(names.DECODE_WORKER, plan.decode.id)
            try:
                stream.record.submitted()
                link.submit(_submit_message(plan, request, name, stream), session)
                if plan.hand_over is not None:
                    answer = await self._prefill(plan, request, name, session, avoid)
                    _first_tokens(answer, request, stream)
                    if not stream.finished:
                        receipt = answer.kv_receipt if answer.HasField("kv_receipt") else None
                        firsts = [first.token.id for first in answer.first_tokens]
                        link.start(name, firsts, receipt)
                        _drop_ended(stream, session)
                    session.settle()
                await session.done
            except asyncio.CancelledError:
                if not stream.finished:
                    span.set_status(trace.StatusCode.ERROR, grpc.StatusCode.CANCELLED.name)
                raise
            except _RETRIED:
                if link.broken or session.failed:
                    avoid.add(plan.decode.address)
                raise
            finally:
                session.close()

    async def _prefill(
        self,
        plan: Plan,
        request: Request,
        name: str,
        session: DecodeSession,
        avoid: set[str],
    ) -> prefill_pb2.PrefillResponse:
        """The prefill worker's answer, or the decode worker's failure if that comes first."""
        assert plan.hand_over is not None
        worker, lease = plan.hand_over.prefill, plan.hand_over.lease.ref
        call = asyncio.create_task(prefill(worker, request, name, lease, request.remaining_s()))
        try:
            waited: set[asyncio.Future[Any]] = {call, session.done}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                await session.done
            try:
                return await call
            except _RETRIED:
                avoid.add(worker.address)
                raise
        finally:
            plan.prefilled()
            call.cancel()
            call.add_done_callback(_look_at)


def _look_at(task: asyncio.Task[prefill_pb2.PrefillResponse]) -> None:
    """Marks the failure of a call that nobody waits for any more as seen."""
    if not task.cancelled():
        task.exception()


def _submit_message(
    plan: Plan, request: Request, name: str, stream: OutputStream
) -> decode_pb2.Submit:
    return decode_pb2.Submit(
        request_id=name,
        prompt_token_ids=request.prompt,
        sampling=request.wire_sampling,
        cache_salt=request.cache_salt,
        lease=plan.hand_over.lease.ref if plan.hand_over is not None else None,
        trace_context=trace_context(),
        timeout_ms=request.timeout_ms(),
        resume=stream.progress() if stream.started else (),
    )


def _first_tokens(
    answer: prefill_pb2.PrefillResponse,
    request: Request,
    stream: OutputStream,
) -> None:
    """Send the prefill worker's tokens on to the client."""
    if len(answer.first_tokens) != request.sampling.n:
        raise WorkerLost(
            f"the prefill worker drew {len(answer.first_tokens)} first tokens "
            f"for {request.sampling.n} choices"
        )
    stream.record.prefilled(answer.cached_tokens, answer.queue_ms / 1000, answer.compute_ms / 1000)
    for index, first in enumerate(answer.first_tokens):
        reason = wire.finish_reason_from_proto(first.finish_reason)
        stream.push(index, 0, [first.token], reason, first.ByteSize())


def _drop_ended(stream: OutputStream, session: DecodeSession) -> None:
    """Choices that their first token ended need not be decoded."""
    for choice in stream.choices:
        if choice.finished:
            session.cancel_choice(choice.index)


def _for_client(error: SplitserveError) -> SplitserveError:
    """What failed between the tiers is no fault that a client could do anything about."""
    if isinstance(error, _INNER):
        return Unavailable(f"the request could not be completed, retry later: {error.message}")
    if isinstance(error, Overloaded) and not isinstance(error, SlowClient):
        return Overloaded(error.message, error.retry_after_s or RETRY_AFTER_S)
    return error


def _backoff_s(attempt: int, request: Request) -> float:
    """Exponential with jitter, and never past the deadline."""
    backoff_s = min(BACKOFF_FIRST_S * 2.0**attempt, BACKOFF_MAX_S) * random.uniform(0.5, 1.5)
    return min(backoff_s, request.remaining_s())
