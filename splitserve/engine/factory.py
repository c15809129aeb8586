"""Opens an engine from settings: reads the checkpoint, sizes the pool, chooses the backends."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias

from splitserve.engine.fake import FakeEngine
from splitserve.engine.protocol import Engine
from splitserve.engine.threads import yield_cores_when_waiting
from splitserve.errors import ConfigError

Quantization: TypeAlias = Literal["none", "fp8", "int8", "int8-smooth", "int4", "int4-awq"]
KvChoice: TypeAlias = Literal["auto", "fp8", "int8"]


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is opened with.

    `quantization` is what plain weights are quantised to while loading; a checkpoint that is
    quantised already needs none. `kv_dtype` is what keys and values are kept in, `auto` for the
    model's own type. `pool_bytes` is the size of the KV pool. `threads=0` leaves torch's choice.
    In deterministic mode a sequence's tokens and log-probabilities are the same bits in any
    batch, chunking, worker and after any interruption, at some cost in speed.
    """

    kind: Literal["torch", "fake"] = "torch"
    model: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    quantization: Quantization = "none"
    kv_dtype: KvChoice = "auto"
    pool_bytes: int = 1 << 30
    block_tokens: int = 16
    max_context_tokens: int = 0
    deterministic: bool = False
    tensor_parallel_size: int = 1
    threads: int = 0
    fake_step_ms: float = 0.0


def open_engine(config: EngineConfig, *, show_progress: bool = False) -> Engine:
    """Open the engine. Raises `CheckpointError` or `ConfigError`, one line each.

    Loads in a thread that ends: OpenMP keeps a team for every thread that has computed, and the
    one that will call `step` should have the only one.
    """
    if config.kind == "fake" or config.device == "cpu":
        _check_fits_memory(config.pool_bytes)
    if config.kind == "fake":
        return _open_fake(config)
    yield_cores_when_waiting()
    # Only workers have torch installed; the fake engine must open without it.
    from splitserve.engine.torch_factory import open_torch_engine

    with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
        return loader.submit(open_torch_engine, config, show_progress=show_progress).result()


def _open_fake(config: EngineConfig) -> Engine:
    layers = 4
    page = layers * config.block_tokens * 8
    return FakeEngine(
        num_pages=max(1, config.pool_bytes // page),
        num_layers=layers,
        block_tokens=config.block_tokens,
        max_context_tokens=config.max_context_tokens or 4096,
        step_s=config.fake_step_ms / 1000,
    )


def _check_fits_memory(pool_bytes: int) -> None:
    """Pages are taken from the system when first written: a pool that can never be had would be
    noticed, as a kill, in the middle of serving. Raises `ConfigError`.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pool_bytes > memory:
        raise ConfigError(f"pool_bytes {pool_bytes} is more than this machine's {memory} of memory")


def layout_fingerprint(identity: bytes, geometry: str) -> bytes:
    """Names weights, data type and block geometry together: 32 bytes."""
    return hashlib.sha256(identity + geometry.encode()).digest()


def pages_in(pool_bytes: int, page_bytes: int) -> int:
    """How many pages a pool has. Raises `ConfigError` if not one fits."""
    if pool_bytes < page_bytes:
        raise ConfigError(f"pool_bytes {pool_bytes} is less than one page of {page_bytes} bytes")
    return pool_bytes // page_bytes
