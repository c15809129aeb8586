"""Opens an engine from settings: reads the checkpoint, sizes the pool, chooses the backends."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, TypeVar

from splitserve.engine.fake import FakeEngine
from splitserve.engine.fake_shared import SharedFakeEngine
from splitserve.engine.protocol import Engine
from splitserve.engine.threads import yield_cores_when_waiting
from splitserve.errors import ConfigError
from splitserve.parallel.rendezvous import (
    ParallelConfig,
    ParallelSettings,
    read_parallel_config,
)

Quantization: TypeAlias = Literal["none", "fp8", "int8", "int8-smooth", "int4", "int4-awq"]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
KvChoice: TypeAlias = Literal["auto", "fp8", "int8"]

CPU_POOL_BYTES: Final = 1 << 30
GPU_MEMORY_UTILIZATION: Final = 0.9

_T = TypeVar("_T")


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is opened with.

    `load_format` "dummy" draws random weights of the shape that `model`'s config.json says.
    `quantization` is what plain weights are quantised to while loading; a checkpoint that is
    quantised already needs none. `kv_dtype` is what keys and values are kept in, `auto` for the
    model's own type. `pool_bytes` is the size of the KV pool of each of `tensor_parallel_size`
    ranks, 0 for 1 GiB on a CPU and, on a GPU, what is left of `gpu_memory_utilization` of its
    memory. `threads` compute in each rank; 0 leaves the choice to torch. `max_batch` is the most
    sequences of a step, `max_step_tokens` the most tokens.
    In deterministic mode a sequence's tokens and log-probabilities are the same bits in any
    batch, chunking, worker and after any interruption, at some cost in speed.
    """

    kind: Literal["torch", "fake"] = "torch"
    model: str = ""
    load_format: LoadFormat = "auto"
    device: str = "cpu"
    dtype: str = "auto"
    quantization: Quantization = "none"
    kv_dtype: KvChoice = "auto"
    pool_bytes: int = 0
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    block_tokens: int = 16
    max_context_tokens: int = 0
    max_batch: int = 64
    max_step_tokens: int = 512
    deterministic: bool = False
    tensor_parallel_size: int = 1
    threads: int = 0
    fake_step_ms: float = 0.0
    fake_shares_pages: bool = False


@dataclass(frozen=True)
class StepSizes:
    """The most sequences and the most tokens of a step, where nobody says otherwise."""

    max_batch: int
    max_step_tokens: int


def step_sizes(device: str) -> StepSizes:
    """What keeps a device of this kind busy."""
    return StepSizes(256, 8192) if device.startswith("cuda") else StepSizes(64, 512)


def open_engine(
    config: EngineConfig, parallel: ParallelConfig | None = None, *, show_progress: bool = False
) -> Engine:
    """Open the engine. Raises `CheckpointError` or `ConfigError`, one line each.

    `parallel` is rank 0's place in a group of `config.tensor_parallel_size`; without it this
    process starts all the other ranks.
    """
    if parallel is None:
        size = config.tensor_parallel_size
        parallel = read_parallel_config(ParallelSettings(tensor_parallel_size=size), {})
    if not config.pool_bytes and (config.kind == "fake" or config.device == "cpu"):
        config = replace(config, pool_bytes=CPU_POOL_BYTES)
    if config.kind == "fake" or config.device == "cpu":
        _check_fits_memory(config.pool_bytes, parallel.local_size)
    if config.kind == "fake":
        if parallel.size > 1:
            raise ConfigError(f"tensor_parallel_size {parallel.size}: the fake engine has no ranks")
        return _open_fake(config)
    yield_cores_when_waiting()
    # Only workers have torch installed; the fake engine must open without it.
    if parallel.size > 1:
        from splitserve.parallel.opening import open_group_engine

        return open_group_engine(config, parallel, show_progress=show_progress)
    from splitserve.engine.torch_factory import open_torch_engine

    return in_own_thread(lambda: open_torch_engine(config, show_progress=show_progress))


def in_own_thread(load: Callable[[], _T]) -> _T:
    """What `load` returns, called in a thread that ends: OpenMP keeps a team for every thread that
    has computed, and the one that will call `step` should have the only one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
        return loader.submit(load).result()


def _open_fake(config: EngineConfig) -> Engine:
    layers = 4
    page = layers * config.block_tokens * 8
    engine = SharedFakeEngine if config.fake_shares_pages else FakeEngine
    return engine(
        num_pages=max(1, config.pool_bytes // page),
        num_layers=layers,
        block_tokens=config.block_tokens,
        max_context_tokens=config.max_context_tokens or 4096,
        step_s=config.fake_step_ms / 1000,
    )


def _check_fits_memory(pool_bytes: int, ranks: int) -> None:
    """Pages are taken from the system when first written: a pool that can never be had would be
    noticed, as a kill, in the middle of serving. Raises `ConfigError`.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pool_bytes * ranks > memory:
        of_ranks = f" of each of {ranks} ranks" if ranks > 1 else ""
        raise ConfigError(
            f"pool_bytes {pool_bytes}{of_ranks} is more than this machine's {memory} of memory"
        )


def layout_fingerprint(identity: bytes, geometry: str) -> bytes:
    """Names weights, data type and block geometry together: 32 bytes."""
    return hashlib.sha256(identity + geometry.encode()).digest()


def pages_in(pool_bytes: int, page_bytes: int) -> int:
    """How many pages a pool has. Raises `ConfigError` if not one fits."""
    if pool_bytes < page_bytes:
        raise ConfigError(f"pool_bytes {pool_bytes} is less than one page of {page_bytes} bytes")
    return pool_bytes // page_bytes
