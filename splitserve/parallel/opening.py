"""Opens the engine of a tensor-parallel worker: rank 0's side, and every other rank's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from splitserve.engine.factory import EngineConfig, in_own_thread
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.torch_factory import ModelEngine, open_torch_engine, page_shape
from splitserve.errors import ConfigError
from splitserve.models.check import check_weights
from splitserve.parallel.cuda_group import CudaGroup
from splitserve.parallel.ending import Ending
from splitserve.parallel.engine import GroupEngine
from splitserve.parallel.follow import Membership
from splitserve.parallel.gloo_group import GlooGroup
from splitserve.parallel.group import Group
from splitserve.parallel.leader import Leader
from splitserve.parallel.page_slices import PageSlices
from splitserve.parallel.rendezvous import LOOPBACK, ParallelConfig
from splitserve.weights.checkpoint import open_checkpoint, read_config


def open_group_engine(
    config: EngineConfig, parallel: ParallelConfig, *, show_progress: bool
) -> GroupEngine:
    """Rank 0: what can be found wrong without the other ranks is found before they are started.

    Raises `ConfigError` or `CheckpointError`, its own or another rank's.
    """
    if config.load_format == "auto":
        check_weights(open_checkpoint(config.model), parallel.size)
    own_config = _of_rank(config, parallel)
    slices = PageSlices(page_shape(config, read_config(config.model)), parallel.size)
    ending = Ending()
    leader = Leader(parallel, ending)
    try:
        leader.assemble(dataclasses.asdict(config))

        def open_own() -> ModelEngine:
            group = _open_group(own_config, parallel, leader.store, ending)
            try:
                return open_torch_engine(own_config, group, show_progress=show_progress)
            except BaseException:
                group.close()
                raise

        own = in_own_thread(open_own)
        _check_alike(own.spec, leader.await_ready())
    except BaseException:
        leader.close()
        raise
    return GroupEngine(own, leader, slices, ending)


def open_rank(membership: Membership) -> ModelEngine:
    """Another rank: its settings are rank 0's."""
    parallel = membership.config
    config = _of_rank(EngineConfig(**membership.plan), parallel)
    group = _open_group(config, parallel, membership.store, membership.ending)
    return open_torch_engine(config, group, show_progress=False)


def _of_rank(config: EngineConfig, parallel: ParallelConfig) -> EngineConfig:
    """What one rank of this node has of a worker's settings."""
    if config.device == "cpu":
        cores = len(os.sched_getaffinity(0))
        threads = config.threads or max(1, cores // parallel.local_size)
        return dataclasses.replace(config, threads=threads)
    if config.device != "cuda":
        raise ConfigError(
            f"device {config.device!r}: ranks take one GPU each, in their order; use --device cuda"
        )
    found = torch.cuda.device_count()
    if parallel.local_size > found:
        raise ConfigError(
            f"tensor_parallel_size {parallel.size}: {parallel.local_size} ranks on this node need "
            f"a GPU each, and torch sees {found} here"
        )
    return dataclasses.replace(config, device=f"cuda:{parallel.local_rank}")


def _open_group(
    config: EngineConfig, parallel: ParallelConfig, store: Store, ending: Ending
) -> Group:
    device = torch.device(config.device)
    if device.type == "cpu":
        host = LOOPBACK if parallel.is_one_node else None
        return GlooGroup(store, parallel.rank, parallel.size, ending, host=host)
    return CudaGroup(
        store,
        parallel.rank,
        parallel.size,
        device,
        ending,
        one_node=parallel.is_one_node,
        in_rank_order=config.deterministic,
    )


def _check_alike(spec: EngineSpec, others: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises `ConfigError` for a rank whose node has another model under the same path."""
    for rank, said in others.items():
        if said["fingerprint"] != spec.fingerprint.hex() or said["num_pages"] != spec.num_pages:
            raise ConfigError(
                f"rank {rank} has opened another model than rank 0: the checkpoint must be the "
                "same on all nodes"
            )
