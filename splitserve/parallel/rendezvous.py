"""Which rank of which group a process is, and where the group meets. Never imports torch.

A group is described in one of three ways, the first that applies:

1. torchrun started every rank: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
   MASTER_PORT say all.
2. LeaderWorkerSet started one process a node: LWS_LEADER_ADDRESS, LWS_GROUP_SIZE (nodes) and
   LWS_WORKER_INDEX. Each node's process starts the other ranks of its node.
3. Otherwise settings: by default one node, whose process starts all the other ranks; with
   `nnodes`, `node_rank` and `master_addr`, one process a node as in 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from splitserve.errors import ConfigError
from splitserve.parallel.shard import Shard

DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"
_MOST_RANKS = 1024


@dataclass(frozen=True)
class ParallelConfig:
    """One rank's place. Ranks are numbered node by node.

    `master_port` 0 takes a free port and is for one node only. `store_is_hosted` says that whoever
    started the ranks (torchrun) already serves a store at `master_addr:master_port`.
    `starts_ranks` says that this process starts the other ranks of its node. `meeting_folder` is
    where a child meets the process that started it.
    """

    size: int = 1
    rank: int = 0
    nnodes: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = LOOPBACK
    master_port: int = 0
    store_is_hosted: bool = False
    starts_ranks: bool = False
    meeting_folder: str = ""

    def __post_init__(self) -> None:
        _check_range("tensor_parallel_size", self.size, 1, _MOST_RANKS)
        _check_range("rank", self.rank, 0, self.size - 1)
        _check_range("local rank", self.local_rank, 0, self.local_size - 1)
        if self.local_size * self.nnodes != self.size:
            raise ConfigError(
                f"tensor_parallel_size {self.size} is not {self.nnodes} nodes of "
                f"{self.local_size} ranks each"
            )
        _check_range("master_port", self.master_port, 0, 65535)
        if self.nnodes > 1 and not (self.master_addr and self.master_port):
            raise ConfigError(
                "a group of several nodes needs master_addr and master_port: where rank 0 is"
            )

    @property
    def shard(self) -> Shard:
        """The part of the model that this rank has."""
        return Shard(self.rank, self.size)

    @property
    def is_one_node(self) -> bool:
        """Whether everything can stay on loopback."""
        return self.nnodes == 1

    @property
    def uses_network(self) -> bool:
        """Whether ranks meet at `master_addr`, or else in a private folder of one node."""
        return not (self.meeting_folder or (self.is_one_node and self.starts_ranks))

    @property
    def node_ranks(self) -> range:
        """The ranks of this node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


@dataclass(frozen=True)
class ParallelSettings:
    """What a user may set. Zero and empty mean not set."""

    tensor_parallel_size: int = 0
    nnodes: int = 0
    node_rank: int = 0
    master_addr: str = ""
    master_port: int = 0


def read_parallel_config(
    settings: ParallelSettings, environment: Mapping[str, str] = os.environ
) -> ParallelConfig:
    """Find this process's place. Raises `ConfigError`, one line, for what contradicts itself."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torchrun(settings, environment)
    if "LWS_GROUP_SIZE" in environment:
        return _from_leader_worker_set(settings, environment)
    nodes = max(1, settings.nnodes)
    return _node_leader(
        settings.tensor_parallel_size or nodes,
        nodes,
        settings.node_rank,
        "node_rank",
        settings.master_addr or (LOOPBACK if nodes == 1 else ""),
        settings.master_port or (0 if nodes == 1 else DEFAULT_PORT),
    )


def _from_torchrun(settings: ParallelSettings, environment: Mapping[str, str]) -> ParallelConfig:
    size = _number(environment, "WORLD_SIZE")
    _check_agrees(settings.tensor_parallel_size, "WORLD_SIZE", size)
    rank = _number(environment, "RANK")
    _check_range("RANK", rank, 0, size - 1)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", size)
    local_rank = _number(environment, "LOCAL_RANK", rank % max(1, local_size))
    if local_size < 1 or size % local_size:
        raise ConfigError(f"WORLD_SIZE {size} does not divide by LOCAL_WORLD_SIZE {local_size}")
    _check_range("LOCAL_RANK", local_rank, 0, local_size - 1)
    if rank % local_size != local_rank:
        raise ConfigError(
            f"RANK {rank} is not LOCAL_RANK {local_rank} of a node of {local_size}: ranks must be "
            "numbered node by node"
        )
    return ParallelConfig(
        size=size,
        rank=rank,
        nnodes=size // local_size,
        local_rank=local_rank,
        local_size=local_size,
        master_addr=_text(environment, "MASTER_ADDR"),
        master_port=_number(environment, "MASTER_PORT"),
        store_is_hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_leader_worker_set(
    settings: ParallelSettings, environment: Mapping[str, str]
) -> ParallelConfig:
    nodes = _number(environment, "LWS_GROUP_SIZE")
    if nodes < 1:
        raise ConfigError(f"LWS_GROUP_SIZE {nodes} must be at least 1")
    if settings.nnodes and settings.nnodes != nodes:
        raise ConfigError(f"nnodes {settings.nnodes} contradicts LWS_GROUP_SIZE {nodes}")
    return _node_leader(
        settings.tensor_parallel_size or nodes,
        nodes,
        _number(environment, "LWS_WORKER_INDEX"),
        "LWS_WORKER_INDEX",
        settings.master_addr or _text(environment, "LWS_LEADER_ADDRESS"),
        settings.master_port or DEFAULT_PORT,
    )


def _node_leader(
    size: int, nodes: int, node: int, node_name: str, address: str, port: int
) -> ParallelConfig:
    """The first rank of a node, which starts the others."""
    _check_range(node_name, node, 0, nodes - 1)
    if size % nodes:
        raise ConfigError(f"tensor_parallel_size {size} does not divide by {nodes} nodes")
    local_size = size // nodes
    return ParallelConfig(
        size=size,
        rank=node * local_size,
        nnodes=nodes,
        local_size=local_size,
        master_addr=address,
        master_port=port,
        starts_ranks=local_size > 1,
    )


def _check_agrees(wanted: int, name: str, found: int) -> None:
    if wanted and wanted != found:
        raise ConfigError(f"tensor_parallel_size {wanted} contradicts {name} {found}")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}, must be {least} to {most}")


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise ConfigError(f"{name} is not set")
    return value


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    value = _text(environment, name)
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}, must be a number") from None
