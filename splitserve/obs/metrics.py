"""Metrics: typed members on one Prometheus registry.

The stems are vLLM's, under `splitserve_`, so that dashboards carry over. Every service makes one
`Metrics`, hands it to what counts, and serves it over HTTP (`splitserve.obs.http`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from splitserve.obs import names

FAST_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
SLOW_SECONDS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
TOKENS = tuple(float(2**power) for power in range(18))
BYTE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)


class TimesHistogram(Histogram):
    """One that takes the same value many times at once."""

    def observe_many(self, value: float, count: int) -> None:
        """As `count` calls of `observe`."""
        self._sum.inc(value * count)
        self._buckets[bisect_left(self._upper_bounds, value)].inc(count)


class Metrics:
    """All metrics of the suite.

    Members without further labels carry `model_name` already; call `.labels(...)` on those whose
    comment names a label. Thread-safe, as the client library is.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, model_name: str = "") -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self._model_name = model_name
        self._add_load()
        self._add_latencies()
        self._add_totals()
        self._add_kv()
        self._add_rpc()

    def _add_load(self) -> None:
        self.num_requests_running = self._gauge(
            names.NUM_REQUESTS_RUNNING, "Requests being computed."
        )
        self.num_requests_waiting = self._gauge(
            names.NUM_REQUESTS_WAITING, "Requests that wait for their turn."
        )
        self.kv_cache_usage_perc = self._gauge(
            names.KV_CACHE_USAGE_PERC, "Share of KV pages that live sequences hold, 0 to 1."
        )

        self.router_split_working = self._plain_gauge(
            names.ROUTER_SPLIT_WORKING,
            "1 if the router's last canary went through the prefill tier, else 0.",
        )

    def _add_latencies(self) -> None:
        self.time_to_first_token_seconds = self._histogram(
            names.TIME_TO_FIRST_TOKEN_SECONDS, "From receipt to the first token.", SLOW_SECONDS
        )
        self.inter_token_latency_seconds = self._histogram(
            names.INTER_TOKEN_LATENCY_SECONDS,
            "Between two tokens of one choice.",
            FAST_SECONDS,
        )
        self.e2e_request_latency_seconds = self._histogram(
            names.E2E_REQUEST_LATENCY_SECONDS, "From receipt to the end.", SLOW_SECONDS
        )
        self.request_queue_time_seconds = self._histogram(
            names.REQUEST_QUEUE_TIME_SECONDS, "Waiting to be computed.", SLOW_SECONDS
        )
        self.request_prefill_time_seconds = self._histogram(
            names.REQUEST_PREFILL_TIME_SECONDS, "Computing the prompt.", SLOW_SECONDS
        )
        self.request_decode_time_seconds = self._histogram(
            names.REQUEST_DECODE_TIME_SECONDS,
            "From the first token to the last.",
            SLOW_SECONDS,
        )
        self.iteration_tokens = self._histogram(
            names.ITERATION_TOKENS, "Tokens computed in one step of the engine.", TOKENS
        )
        self.request_prompt_tokens = self._histogram(
            names.REQUEST_PROMPT_TOKENS, "Tokens of a request's prompt.", TOKENS
        )
        self.request_generation_tokens = self._histogram(
            names.REQUEST_GENERATION_TOKENS, "Tokens that a request generated.", TOKENS
        )

    def _add_totals(self) -> None:
        self.num_preemptions = self._counter(
            names.NUM_PREEMPTIONS, "Sequences put back for want of pages."
        )
        self.prompt_tokens = self._counter(
            names.PROMPT_TOKENS, "Prompt tokens taken in, cached ones included."
        )
        self.generation_tokens = self._counter(names.GENERATION_TOKENS, "Tokens generated.")
        self.prefix_cache_queries = self._counter(
            names.PREFIX_CACHE_QUERIES, "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_cache_hits = self._counter(
            names.PREFIX_CACHE_HITS, "Prompt tokens whose KV the prefix cache had."
        )
        # .labels(model_name, finished_reason), see `request_succeeded`
        self._request_success = self._counter_family(
            names.REQUEST_SUCCESS,
            "Choices that ended well, by reason.",
            names.LABEL_MODEL_NAME,
            names.LABEL_FINISHED_REASON,
        )
        self._request_failures = self._counter_family(
            names.REQUEST_FAILURES,
            "Requests that ended with an error, by gRPC status.",
            names.LABEL_MODEL_NAME,
            names.LABEL_CODE,
        )

        # .labels(route), see `services.router.planner.Plan`
        self.router_plans = self._counter_family(
            names.ROUTER_PLANS, "Ways that requests were sent, by route.", names.LABEL_ROUTE
        )

    def _add_kv(self) -> None:
        self.kvstore_live_leases = self._plain_gauge(
            names.KVSTORE_LIVE_LEASES, "Leases that are live."
        )
        self.kvstore_leases_expired = self._counter_family(
            names.KVSTORE_LEASES_EXPIRED, "Leases that ended because no one renewed them."
        )
        self.kvstore_used_bytes = self._plain_gauge(
            names.KVSTORE_USED_BYTES, "Bytes of the arena in use."
        )
        self.kvstore_arena_bytes = self._plain_gauge(
            names.KVSTORE_ARENA_BYTES, "Bytes of the arena."
        )
        # .labels(state) with committed, reserved or held
        self.kvstore_blocks = self._plain_gauge(
            names.KVSTORE_BLOCKS, "Blocks in the store, by state.", names.LABEL_STATE
        )
        self.kvstore_evictions = self._counter_family(
            names.KVSTORE_EVICTIONS, "Blocks evicted to make room."
        )
        # .labels(transport, direction) with read or write
        self.kv_transfer_bytes = self._counter_family(
            names.KV_TRANSFER_BYTES,
            "KV bytes moved between a worker and a store.",
            names.LABEL_TRANSPORT,
            names.LABEL_DIRECTION,
        )
        self.kv_transfer_seconds = Histogram(
            names.KV_TRANSFER_SECONDS,
            "Moving one block between a worker and a store.",
            (names.LABEL_TRANSPORT, names.LABEL_DIRECTION),
            namespace=names.METRIC_NAMESPACE,
            buckets=BYTE_SECONDS,
            registry=self.registry,
        )

    def _add_rpc(self) -> None:
        # .labels(method)
        self.rpc_server_started = self._counter_family(
            names.RPC_SERVER_STARTED, "RPCs that arrived.", names.LABEL_METHOD
        )
        # .labels(method, code)
        self.rpc_server_handled = self._counter_family(
            names.RPC_SERVER_HANDLED,
            "RPCs that ended, by gRPC status.",
            names.LABEL_METHOD,
            names.LABEL_CODE,
        )
        # .labels(method)
        self.rpc_server_duration_seconds = Histogram(
            names.RPC_SERVER_DURATION_SECONDS,
            "From an RPC's arrival to its end.",
            (names.LABEL_METHOD,),
            namespace=names.METRIC_NAMESPACE,
            buckets=SLOW_SECONDS,
            registry=self.registry,
        )

    def request_succeeded(self, finished_reason: str) -> None:
        """Counts a choice that ended with `stop` or `length`."""
        self._request_success.labels(self._model_name, finished_reason).inc()

    def request_failed(self, code: str) -> None:
        """Counts a request that ended with the gRPC status named `code`, such as `CANCELLED`."""
        self._request_failures.labels(self._model_name, code).inc()

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._plain_gauge(name, text, names.LABEL_MODEL_NAME).labels(self._model_name)

    def _plain_gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=names.METRIC_NAMESPACE, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return self._counter_family(name, text, names.LABEL_MODEL_NAME).labels(self._model_name)

    def _counter_family(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=names.METRIC_NAMESPACE, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> TimesHistogram:
        return TimesHistogram(
            name,
            text,
            (names.LABEL_MODEL_NAME,),
            namespace=names.METRIC_NAMESPACE,
            buckets=buckets,
            registry=self.registry,
        ).labels(self._model_name)
