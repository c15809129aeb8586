"""Every name that leaves the process: spans, attributes, events, metrics, log fields.

Dashboards and alerts are built on these, so a change here is a change of a public interface.
The `gen_ai.*` names follow the OpenTelemetry conventions for generative AI and for RPC, which are
still in development; the metric stems are the ones that vLLM's dashboards read.
"""

from __future__ import annotations

# --- spans -----------------------------------------------------------------------------------

SPAN_REQUEST = "request"
SPAN_TOKENIZE = "tokenize"
SPAN_QUEUE = "queue"
SPAN_PLAN = "plan"
SPAN_PREFILL = "prefill"
SPAN_PREFILL_CHUNK = "prefill.chunk"
SPAN_KV_RESERVE = "kv.reserve"
SPAN_KV_WRITE = "kv.write"
SPAN_KV_COMMIT = "kv.commit"
SPAN_KV_AWAIT = "kv.await"
SPAN_KV_READ = "kv.read"
SPAN_KV_TRANSFER = "kv.transfer"
SPAN_DECODE = "decode"
SPAN_PREEMPTED = "preempted"

EVENT_FIRST_TOKEN = "first_token"
EVENT_FIRST_LAYERS = "first_layers"
EVENT_PREEMPTED = "preempted"
EVENT_RESUMED = "resumed"
EVENT_WORKER_LOST = "worker_lost"

# --- RPC attributes --------------------------------------------------------------------------

RPC_SYSTEM_NAME = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.response.status_code"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
ERROR_TYPE = "error.type"
RPC_SYSTEM_GRPC = "grpc"

# --- generation attributes -------------------------------------------------------------------

GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_P = "gen_ai.request.top_p"
GEN_AI_REQUEST_TOP_K = "gen_ai.request.top_k"
GEN_AI_REQUEST_SEED = "gen_ai.request.seed"
GEN_AI_REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
GEN_AI_RESPONSE_ID = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_LATENCY_TTFT = "gen_ai.latency.time_to_first_token"
GEN_AI_LATENCY_E2E = "gen_ai.latency.e2e"
GEN_AI_LATENCY_QUEUE = "gen_ai.latency.time_in_queue"
GEN_AI_LATENCY_PREFILL = "gen_ai.latency.time_in_model_prefill"
GEN_AI_LATENCY_DECODE = "gen_ai.latency.time_in_model_decode"

PROVIDER = "splitserve"
OPERATION_TEXT_COMPLETION = "text_completion"
OPERATION_CHAT = "chat"

# --- the suite's own attributes --------------------------------------------------------------

REQUEST_ID = "splitserve.request.id"
WORKER_ID = "splitserve.worker.id"
PREFILL_WORKER = "splitserve.prefill.worker"
DECODE_WORKER = "splitserve.decode.worker"
ROUTE = "splitserve.route"
CACHED_TOKENS = "splitserve.cached_tokens"
COMPUTED_TOKENS = "splitserve.computed_tokens"
BATCH_SIZE = "splitserve.batch_size"
NUM_STEPS = "splitserve.num_steps"
KV_BLOCKS = "splitserve.kv.blocks"
KV_BYTES = "splitserve.kv.bytes"
KV_TRANSPORT = "splitserve.kv.transport"
KV_BUSY_MS = "splitserve.kv.busy_ms"
KV_LEASE_ID = "splitserve.kv.lease_id"

# --- RPCs that get no span -------------------------------------------------------------------

METHODS_WITHOUT_SPANS = frozenset(
    {
        # Open as long as a worker lives: their spans would end with the process.
        "/splitserve.v1.WorkerService/WatchState",
        "/splitserve.v1.DecodeService/Attach",
        "/splitserve.v1.KvStoreService/PublishBlocks",
        # Called several times a second on behalf of no request.
        "/splitserve.v1.KvStoreService/RenewLeases",
        "/splitserve.v1.KvStoreService/GetStats",
        # Once for many requests, or for a worker.
        "/splitserve.v1.KvStoreService/ReleaseLeases",
        "/splitserve.v1.KvStoreService/Connect",
        # Once for each block: the spans `kv.write` and `kv.read` tell of all of a request's.
        "/splitserve.v1.KvStoreService/WriteBlocks",
        "/splitserve.v1.KvStoreService/ReadBlocks",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)

# --- metrics: Prometheus, seconds and bytes --------------------------------------------------

METRIC_NAMESPACE = "splitserve"

NUM_REQUESTS_RUNNING = "num_requests_running"
NUM_REQUESTS_WAITING = "num_requests_waiting"
KV_CACHE_USAGE_PERC = "kv_cache_usage_perc"
TIME_TO_FIRST_TOKEN_SECONDS = "time_to_first_token_seconds"
INTER_TOKEN_LATENCY_SECONDS = "inter_token_latency_seconds"
E2E_REQUEST_LATENCY_SECONDS = "e2e_request_latency_seconds"
REQUEST_QUEUE_TIME_SECONDS = "request_queue_time_seconds"
REQUEST_PREFILL_TIME_SECONDS = "request_prefill_time_seconds"
REQUEST_DECODE_TIME_SECONDS = "request_decode_time_seconds"
ITERATION_TOKENS = "iteration_tokens"
REQUEST_PROMPT_TOKENS = "request_prompt_tokens"
REQUEST_GENERATION_TOKENS = "request_generation_tokens"
# Counters: the client library appends `_total`.
NUM_PREEMPTIONS = "num_preemptions"
PROMPT_TOKENS = "prompt_tokens"
GENERATION_TOKENS = "generation_tokens"
REQUEST_SUCCESS = "request_success"
REQUEST_FAILURES = "request_failures"
PREFIX_CACHE_QUERIES = "prefix_cache_queries"
PREFIX_CACHE_HITS = "prefix_cache_hits"

ROUTER_SPLIT_WORKING = "router_split_working"
ROUTER_PLANS = "router_plans"

KVSTORE_LIVE_LEASES = "kvstore_live_leases"
KVSTORE_LEASES_EXPIRED = "kvstore_leases_expired"
KVSTORE_USED_BYTES = "kvstore_used_bytes"
KVSTORE_ARENA_BYTES = "kvstore_arena_bytes"
KVSTORE_BLOCKS = "kvstore_blocks"
KVSTORE_EVICTIONS = "kvstore_evictions"
KV_TRANSFER_BYTES = "kv_transfer_bytes"
KV_TRANSFER_SECONDS = "kv_transfer_seconds"

RPC_SERVER_STARTED = "rpc_server_started"
RPC_SERVER_HANDLED = "rpc_server_handled"
RPC_SERVER_DURATION_SECONDS = "rpc_server_duration_seconds"

LABEL_MODEL_NAME = "model_name"
LABEL_FINISHED_REASON = "finished_reason"
LABEL_CODE = "code"
LABEL_METHOD = "method"
LABEL_STATE = "state"
LABEL_ROUTE = "route"
LABEL_TRANSPORT = "transport"
LABEL_DIRECTION = "direction"

# --- log fields ------------------------------------------------------------------------------

LOG_TIME = "time"
LOG_LEVEL = "level"
LOG_LOGGER = "logger"
LOG_MESSAGE = "message"
LOG_SERVICE = "service"
LOG_TRACE_ID = "trace_id"
LOG_SPAN_ID = "span_id"
LOG_REQUEST_ID = "request_id"
LOG_EXCEPTION = "exception"

# --- gRPC metadata ---------------------------------------------------------------------------

METADATA_REQUEST_ID = "x-request-id"
