"""Settings of a prefill worker, on top of those of every worker."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from splitserve.worker.config import WorkerConfig


class PrefillConfig(WorkerConfig):
    """What `python -m services.prefill --help` lists."""

    step_tokens_on_gpu: ClassVar[int] = 2048
    """Products of so many rows are as fast as of more but for 3%, and whoever shares a step waits
    for all of it.
    """

    port: int = Field(50052, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    metrics_port: int = Field(
        9092, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )
