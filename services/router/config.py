"""Settings of the router, on top of those of every service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from splitserve.config import ServiceConfig
from splitserve.model_name import default_model_name

ANY_MODEL = "default"
"""What the model is called where neither flag nor file names it."""

_TARGETS = "HOST:PORT,HOST:PORT or dns:///NAME:PORT"


class RouterConfig(ServiceConfig):
    """What `python -m services.router --help` lists."""

    port: int = Field(50051, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    metrics_port: int = Field(
        9091, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )

    prefill: str = Field(
        "127.0.0.1:50052",
        description=f"prefill workers: {_TARGETS}; none: decode workers compute prompts, too",
    )
    decode: str = Field("127.0.0.1:50053", description=f"decode workers: {_TARGETS}")
    dns_refresh_s: float = Field(3.0, gt=0, description="seconds between two DNS look-ups")
    policy: str = Field(
        "prefix-load", description="routing policy: prefix-load, least-loaded or round-robin"
    )

    model: Path | None = Field(
        None, description="checkpoint whose tokenizer is used: a directory or a .gguf file"
    )
    model_name: str | None = Field(
        None, description="name that clients ask for; default: the stem of --model"
    )
    skip_tokenizer_init: bool = Field(False, description="take token ids only, and no --model")
    vocab_size: int = Field(
        0, ge=0, le=2**31 - 1, description="tokens in the vocabulary; 0: as --model says"
    )
    max_context_tokens: int = Field(
        0, ge=0, le=2**31 - 1, description="longest context; 0: as --model and the workers say"
    )

    max_tokens_cap: int = Field(4096, ge=1, description="most output tokens of one choice")
    default_max_tokens: int = Field(
        1024, ge=1, description="output tokens where a request does not say"
    )
    max_choices: int = Field(16, ge=1, le=1024, description="most choices of one request")
    max_message_bytes: int = Field(4 << 20, ge=1024, description="longest message of a client")

    api_keys_file: Path | None = Field(
        None, description="file of lines TENANT:KEY; default: everybody may call"
    )
    share_cache_between_tenants: bool = Field(
        False, description="let tenants reuse each other's cached prefixes"
    )

    max_running: int = Field(2048, ge=1, description="most requests at a time")
    max_waiting: int = Field(2048, ge=0, description="most requests that wait for their turn")
    max_queued_tokens: int = Field(
        1_000_000, ge=1, description="most prompt tokens that wait to be computed"
    )
    max_pending_bytes: int = Field(
        256 << 10, ge=1024, description="most bytes that wait for one client that reads slowly"
    )

    local_prefill_tokens: int = Field(
        32, ge=0, description="prompts with fewer uncached tokens are computed by decode workers"
    )
    max_prefill_wait_ms: float = Field(
        100.0,
        ge=0,
        description="prompts that would wait longer for a prefill worker are computed by decode "
        "workers where that is sooner",
    )
    default_deadline_s: float = Field(
        600.0, gt=0, description="seconds for a request that sets no deadline"
    )
    max_deadline_s: float = Field(3600.0, gt=0, description="most seconds for any request")
    worker_wait_s: float = Field(
        3.0, ge=0, description="seconds that a request waits for a worker to come back"
    )
    max_attempts: int = Field(4, ge=1, le=32, description="most tries of one request")
    lease_ttl_ms: int = Field(3000, ge=300, description="time to live of KV leases, renewed")
    store_timeout_s: float = Field(
        2.0, gt=0, description="seconds until a KV store that says nothing is done without"
    )

    canary_interval_s: float = Field(
        5.0, gt=0, description="seconds between two generations that readiness rests on"
    )
    canary_timeout_s: float = Field(10.0, gt=0, description="seconds that one of them may take")
    split_wait_s: float = Field(
        5.0, ge=0, description="seconds at start that readiness waits for the prefill tier"
    )

    @property
    def served_name(self) -> str:
        """The model's name for clients."""
        if self.model_name:
            return self.model_name
        if self.model is None:
            return ANY_MODEL
        return default_model_name(self.model)
