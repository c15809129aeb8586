"""What is counted and timed of one request, for its client, its trace and the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from opentelemetry import trace

from services.router.admission import Ticket
from services.router.choice import ChoiceOutput
from services.router.request import Request
from splitserve.obs import names
from splitserve.obs.metrics import Metrics
from splitserve.v1 import inference_pb2


class RequestRecord:
    """Counts and times of one request. Times are seconds on the event loop's clock.

    The span current when it is made gets the request's attributes and its `first_token` event.
    """

    def __init__(self, request: Request, ticket: Ticket, metrics: Metrics, model: str) -> None:
        loop = asyncio.get_running_loop()
        self._now: Callable[[], float] = loop.time
        self._request = request
        self._ticket = ticket
        self._metrics = metrics
        self._span = trace.get_current_span()
        self._last_token_s = [0.0] * request.sampling.n
        self._num_tokens = 0
        self._first_token_s: float | None = None
        self._end_s: float | None = None
        self.cached_tokens = 0
        self.admitted_s = self._now()
        self.submitted_s = self.admitted_s
        self.worker_queue_s = 0.0
        self.prefill_s: float | None = None
        self._span.set_attributes(_request_attributes(request, model))

    def submitted(self) -> None:
        """The request was handed to a decode worker, perhaps not for the first time."""
        self.submitted_s = self._now()

    def prefilled(self, cached_tokens: int, queue_s: float, compute_s: float) -> None:
        """A prefill worker computed the prompt."""
        self.cached_tokens = cached_tokens
        self.worker_queue_s = queue_s
        self.prefill_s = compute_s

    def found_on_decode(self, cached_tokens: int) -> None:
        """A decode worker found part of the prompt; counts if it computes the rest itself."""
        if self.prefill_s is None and self._first_token_s is None:
            self.cached_tokens = cached_tokens

    def tokens_came(self, choice: int, count: int) -> None:
        """New tokens of a choice are on their way to the client."""
        now = self._now()
        self._num_tokens += count
        if self._first_token_s is None:
            self._first_token_s = now
            self._ticket.first_token()
            self._span.add_event(names.EVENT_FIRST_TOKEN)
            self._metrics.time_to_first_token_seconds.observe(now - self._request.received_s)
        last_s = self._last_token_s[choice]
        if last_s:
            self._metrics.inter_token_latency_seconds.observe((now - last_s) / count)
        self._last_token_s[choice] = now

    def finished(self, choices: Sequence[ChoiceOutput]) -> None:
        """The last choice has ended."""
        self._end_s = self._now()
        reasons = [choice.finish_reason.value for choice in choices if choice.finish_reason]
        for reason in reasons:
            self._metrics.request_succeeded(reason)
        self._span.set_attribute(names.GEN_AI_RESPONSE_FINISH_REASONS, reasons)

    def close(self) -> None:
        """The request is over, however it ended."""
        end_s = self._end_s if self._end_s is not None else self._now()
        metrics, prompt_tokens = self._metrics, len(self._request.prompt)
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.generation_tokens.inc(self._num_tokens)
        metrics.request_prompt_tokens.observe(prompt_tokens)
        metrics.request_generation_tokens.observe(self._num_tokens)
        metrics.prefix_cache_queries.inc(prompt_tokens)
        metrics.prefix_cache_hits.inc(self.cached_tokens)
        metrics.request_queue_time_seconds.observe(self._queue_s())
        attributes: dict[str, float | int] = {
            names.GEN_AI_USAGE_INPUT_TOKENS: prompt_tokens,
            names.GEN_AI_USAGE_OUTPUT_TOKENS: self._num_tokens,
            names.CACHED_TOKENS: self.cached_tokens,
            names.GEN_AI_LATENCY_E2E: end_s - self._request.received_s,
            names.GEN_AI_LATENCY_QUEUE: self._queue_s(),
        }
        if self._first_token_s is not None:
            attributes[names.GEN_AI_LATENCY_TTFT] = self._first_token_s - self._request.received_s
            attributes[names.GEN_AI_LATENCY_PREFILL] = self._prefill_s()
            attributes[names.GEN_AI_LATENCY_DECODE] = end_s - self._first_token_s
            metrics.request_prefill_time_seconds.observe(self._prefill_s())
            metrics.request_decode_time_seconds.observe(end_s - self._first_token_s)
        if self._end_s is not None:
            metrics.e2e_request_latency_seconds.observe(end_s - self._request.received_s)
        self._span.set_attributes(attributes)

    def usage(self) -> inference_pb2.Usage:
        """For the client's last message."""
        return inference_pb2.Usage(
            prompt_tokens=len(self._request.prompt),
            cached_prompt_tokens=self.cached_tokens,
            completion_tokens=self._num_tokens,
        )

    def timings(self) -> inference_pb2.Timings:
        """For the client's last message, after `finished`."""
        end_s = self._end_s if self._end_s is not None else self._now()
        first_s = self._first_token_s if self._first_token_s is not None else end_s
        return inference_pb2.Timings(
            time_to_first_token_ms=1000 * (first_s - self._request.received_s),
            total_ms=1000 * (end_s - self._request.received_s),
            queue_ms=1000 * self._queue_s(),
            prefill_ms=1000 * self._prefill_s(),
            decode_ms=1000 * (end_s - first_s),
        )

    def _queue_s(self) -> float:
        return self.admitted_s - self._request.received_s + self.worker_queue_s

    def _prefill_s(self) -> float:
        """As the prefill worker measured; without one, from the hand-over to the first token."""
        if self.prefill_s is not None:
            return self.prefill_s
        return (self._first_token_s or self.submitted_s) - self.submitted_s


def _request_attributes(request: Request, model: str) -> dict[str, str | int | float]:
    params = request.sampling
    return {
        names.GEN_AI_OPERATION_NAME: (
            names.OPERATION_CHAT if request.is_chat else names.OPERATION_TEXT_COMPLETION
        ),
        names.GEN_AI_PROVIDER_NAME: names.PROVIDER,
        names.GEN_AI_REQUEST_MODEL: model,
        names.GEN_AI_RESPONSE_MODEL: model,
        names.GEN_AI_RESPONSE_ID: request.id,
        names.REQUEST_ID: request.id,
        names.GEN_AI_REQUEST_MAX_TOKENS: params.max_tokens or 0,
        names.GEN_AI_REQUEST_TEMPERATURE: params.temperature,
        names.GEN_AI_REQUEST_TOP_P: params.top_p,
        names.GEN_AI_REQUEST_TOP_K: params.top_k,
        # Spans hold signed 64-bit integers; a seed is unsigned.
        names.GEN_AI_REQUEST_SEED: str(params.seed),
        names.GEN_AI_REQUEST_CHOICE_COUNT: params.n,
    }
