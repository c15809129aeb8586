"""Settings of a decode worker, on top of those of every worker."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from splitserve.worker.config import WorkerConfig

_STEP_TOKENS = 512
"""On a GPU: who decodes there waits for the prompts that are computed in the same step."""


class DecodeConfig(WorkerConfig):
    """What `python -m services.decode --help` lists."""

    port: int = Field(50053, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    metrics_port: int = Field(
        9093, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )
    max_pending_tokens: int = Field(
        65536, ge=1, description="tokens a router may leave unread before its stream ends"
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_steps_short(cls, given: dict[str, Any]) -> dict[str, Any]:
        if not str(given.get("device", "cpu")).startswith("cuda"):
            return given
        return {"max_step_tokens": max(_STEP_TOKENS, 2 * int(given.get("max_batch", 0))), **given}
