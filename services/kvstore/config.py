"""Settings of the KV store, on top of those of every service."""

from __future__ import annotations

from pydantic import Field

from services.kvstore.space import PAGE_BYTES
from splitserve.config import ServiceConfig


class KvStoreConfig(ServiceConfig):
    """What `python -m services.kvstore --help` lists."""

    port: int = Field(50054, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    metrics_port: int = Field(
        9094, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )
    arena_bytes: int = Field(
        1 << 30, ge=PAGE_BYTES, le=1 << 46, description="bytes of memory for KV blocks"
    )
    shared_memory: bool = Field(True, description="hand the arena to processes of this node")
    handle_socket: str | None = Field(
        None,
        description="path of the Unix socket that hands out the arena, for pods that share a "
        "directory; default: an abstract socket, which leaves no file",
    )
    redis_url: str | None = Field(
        None,
        pattern=r"^(rediss?|unix)://",
        description="directory in Redis, such as redis://127.0.0.1:6379/0; default: embedded",
    )
    max_leases: int = Field(16384, ge=1, description="most live leases")
    max_lease_ttl_ms: int = Field(60_000, ge=1, description="longest time to live of a lease")
    max_awaiting_calls: int = Field(16384, ge=1, description="most AwaitBlocks calls at a time")
    max_awaited_keys: int = Field(1_000_000, ge=1, description="most blocks awaited at a time")
    max_directory_entries: int = Field(
        4_000_000, ge=1, description="most blocks of workers' pools that are remembered"
    )
