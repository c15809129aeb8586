"""Settings of a prefill worker, on top of those of every worker."""

from __future__ import annotations

from pydantic import Field

from splitserve.worker.config import WorkerConfig


class PrefillConfig(WorkerConfig):
    """What `python -m services.prefill --help` lists."""

    port: int = Field(50052, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    metrics_port: int = Field(
        9092, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )
