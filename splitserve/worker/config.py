"""Settings that prefill and decode workers share."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from splitserve.config import ServiceConfig
from splitserve.engine.core import CoreConfig
from splitserve.engine.factory import EngineConfig, KvChoice, LoadFormat, Quantization, step_sizes
from splitserve.errors import ConfigError
from splitserve.model_name import default_model_name
from splitserve.parallel.rendezvous import (
    ParallelConfig,
    ParallelSettings,
    read_parallel_config,
)


class WorkerConfig(ServiceConfig):
    """Engine, KV pool, store connection and batching of one worker."""

    step_tokens_on_gpu: ClassVar[int]
    """Most tokens of a step there, where nobody says otherwise."""

    engine: Literal["torch", "fake"] = Field(
        "torch", description="torch computes a model; fake does arithmetic, for tests"
    )
    model: str = Field("", description="checkpoint: a Hugging Face directory or a GGUF file")
    model_name: str = Field("", description="name the model is served under; default: its file's")
    device: str = Field("cpu", description="where the model runs: cpu or cuda")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16")
    quantization: Quantization = Field(
        "none", description="what plain weights are quantised to while loading"
    )
    kv_dtype: KvChoice = Field("auto", description="of keys and values: auto, fp8 or int8")
    tensor_parallel_size: int = Field(
        0, ge=0, le=64, description="ranks that share the model; 0: what started them says, or 1"
    )
    nnodes: int = Field(0, ge=0, le=64, description="nodes that the ranks are on; 0: as above")
    node_rank: int = Field(0, ge=0, description="number of this node; rank 0 is on node 0")
    master_addr: str = Field("", description="where the ranks of all nodes reach rank 0")
    master_port: int = Field(
        0, ge=0, le=65535, description="port there that the ranks meet at; 0: 29500"
    )
    max_context_tokens: int = Field(0, ge=0, description="longest context; 0: the model's own")
    kvstore: str = Field("127.0.0.1:50054", description="HOST:PORT of this node's KV store")
    transport: Literal["auto", "device", "shm", "grpc"] = Field(
        "auto",
        description="how KV blocks travel; auto leaves them in GPUs that their readers can map, "
        "takes shared memory where it can, else gRPC; device as auto, where GPUs can be mapped",
    )
    load_format: LoadFormat = Field(
        "auto", description="dummy: random weights of the shape that config.json says"
    )
    pool_bytes: int = Field(
        0, ge=0, description="bytes of the KV pool of each rank; 0: 1 GiB, or what a GPU has left"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, lt=1, description="share of a GPU's memory that this worker may take"
    )
    block_tokens: int = Field(16, ge=1, le=1024, description="tokens of one KV block")
    max_batch: int = Field(
        64, ge=1, le=4096, description="most sequences in one step; on a GPU 256 by default"
    )
    max_step_tokens: int = Field(
        0,
        ge=0,
        description="most tokens of a step; 0: 512, of prefill workers on a GPU 2048, or what "
        "--max-batch needs",
    )
    max_queue: int = Field(4096, ge=1, description="most sequences accepted and not finished")
    deterministic: bool = Field(
        False, description="the same tokens and log-probabilities, bit by bit, in any batch"
    )
    threads: int = Field(0, ge=0, description="threads of each rank; 0: its own choice")
    nice: int = Field(0, ge=0, le=19, description="how far to step back for other processes")
    skip_prefix_cache: bool = Field(
        False, description="compute every prompt, whatever pool and store have of it"
    )
    worker_id: str = Field("", description="unique to this run of the process; default: random")
    stuck_after_s: float = Field(
        20.0, gt=0, description="seconds one step may take before the worker is not ready"
    )
    fake_step_ms: float = Field(0.0, ge=0, description="length of a step of the fake engine")

    @model_validator(mode="before")
    @classmethod
    def _size_for_device(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"max_batch": step_sizes(str(given.get("device", "cpu"))).max_batch, **given}

    @model_validator(mode="after")
    def _check_engine(self) -> WorkerConfig:
        if self.engine == "torch" and not self.model:
            raise ConfigError("SPLITSERVE_MODEL (--model): name a checkpoint to serve")
        if 0 < self.max_step_tokens < self.max_batch + self.block_tokens:
            raise ConfigError(
                "SPLITSERVE_MAX_STEP_TOKENS (--max-step-tokens): must be at least "
                f"--max-batch + --block-tokens = {self.max_batch + self.block_tokens}, "
                f"not {self.max_step_tokens}"
            )
        return self

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step: as was said, or what suits the device and the tier."""
        if self.max_step_tokens:
            return self.max_step_tokens
        on_gpu = self.device.startswith("cuda")
        usual = self.step_tokens_on_gpu if on_gpu else step_sizes(self.device).max_step_tokens
        return max(usual, self.max_batch + 2 * self.block_tokens)

    @property
    def served_name(self) -> str:
        """The name that clients ask for."""
        if self.model_name:
            return self.model_name
        return default_model_name(self.model) if self.model else "fake"

    @cached_property
    def parallel(self) -> ParallelConfig:
        """This process's place among the ranks. Raises `ConfigError`."""
        return read_parallel_config(
            ParallelSettings(
                tensor_parallel_size=self.tensor_parallel_size,
                nnodes=self.nnodes,
                node_rank=self.node_rank,
                master_addr=self.master_addr,
                master_port=self.master_port,
            )
        )

    @property
    def engine_config(self) -> EngineConfig:
        """What the engine is opened with."""
        return EngineConfig(
            kind=self.engine,
            model=self.model,
            device=self.device,
            load_format=self.load_format,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            tensor_parallel_size=self.parallel.size,
            pool_bytes=self.pool_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            block_tokens=self.block_tokens,
            max_context_tokens=self.max_context_tokens,
            max_batch=self.max_batch,
            max_step_tokens=self.step_tokens,
            deterministic=self.deterministic,
            threads=self.threads,
            fake_step_ms=self.fake_step_ms,
            fake_shares_pages=self.transport in ("device", "shm"),
        )

    @property
    def core_config(self) -> CoreConfig:
        """Sizes of the engine's loop."""
        return CoreConfig(
            max_batch=self.max_batch,
            max_step_tokens=self.step_tokens,
            max_queue=self.max_queue,
            reuse_prefixes=not self.skip_prefix_cache,
        )
