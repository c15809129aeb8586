"""Settings of a decode worker, on top of those of every worker."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from splitserve.worker.config import WorkerConfig


class DecodeConfig(WorkerConfig):
    """What `python -m services.decode --help` lists."""

    step_tokens_on_gpu: ClassVar[int] = 512
    """Who decodes waits for the prompts that are computed in the same step."""

    port: int = Field(50053, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    metrics_port: int = Field(
        9093, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )
    max_pending_tokens: int = Field(
        65536, ge=1, description="tokens a router may leave unread before its stream ends"
    )
