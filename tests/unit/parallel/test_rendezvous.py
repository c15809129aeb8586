from __future__ import annotations

import pytest

from splitserve.errors import ConfigError
from splitserve.parallel.rendezvous import (
    ParallelConfig,
    ParallelSettings,
    read_parallel_config,
)
from splitserve.parallel.shard import Shard

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "leader",
    "MASTER_PORT": "29400",
}
LWS = {"LWS_LEADER_ADDRESS": "decode-0", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}


def test_nothing_set_is_one_rank() -> None:
    config = read_parallel_config(ParallelSettings(), {})
    assert config == ParallelConfig()
    assert config.shard == Shard(0, 1)


def test_one_node_starts_its_own_ranks() -> None:
    config = read_parallel_config(ParallelSettings(tensor_parallel_size=4), {})
    assert config == ParallelConfig(size=4, local_size=4, starts_ranks=True)
    assert config.node_ranks == range(4)


def test_two_nodes_by_settings() -> None:
    settings = ParallelSettings(4, nnodes=2, node_rank=1, master_addr="10.0.0.1", master_port=7)
    config = read_parallel_config(settings, {})
    assert (config.rank, config.local_size, config.starts_ranks) == (2, 2, True)
    assert (config.master_addr, config.master_port) == ("10.0.0.1", 7)
    assert config.node_ranks == range(2, 4)


def test_torchrun() -> None:
    config = read_parallel_config(ParallelSettings(tensor_parallel_size=4), TORCHRUN)
    assert config == ParallelConfig(4, 3, 2, 1, 2, "leader", 29400)
    agent = TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_parallel_config(ParallelSettings(), agent).store_is_hosted


def test_leader_worker_set() -> None:
    config = read_parallel_config(ParallelSettings(), LWS)
    assert config == ParallelConfig(2, 1, 2, 0, 1, "decode-0", 29500)
    sixteen = read_parallel_config(ParallelSettings(tensor_parallel_size=16), LWS)
    assert (sixteen.rank, sixteen.local_size, sixteen.starts_ranks) == (8, 8, True)


@pytest.mark.parametrize(
    ("settings", "environment", "line"),
    [
        (
            ParallelSettings(tensor_parallel_size=2),
            TORCHRUN,
            "tensor_parallel_size 2 contradicts WORLD_SIZE 4",
        ),
        (ParallelSettings(), TORCHRUN | {"RANK": "4"}, "RANK is 4, must be 0 to 3"),
        (ParallelSettings(), TORCHRUN | {"RANK": "one"}, "RANK is 'one', must be a number"),
        (
            ParallelSettings(),
            TORCHRUN | {"LOCAL_RANK": "0"},
            "RANK 3 is not LOCAL_RANK 0 of a node of 2: ranks must be numbered node by node",
        ),
        (
            ParallelSettings(),
            TORCHRUN | {"LOCAL_WORLD_SIZE": "3"},
            "WORLD_SIZE 4 does not divide by LOCAL_WORLD_SIZE 3",
        ),
        (ParallelSettings(), TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (
            ParallelSettings(tensor_parallel_size=3),
            LWS,
            "tensor_parallel_size 3 does not divide by 2 nodes",
        ),
        (ParallelSettings(nnodes=3), LWS, "nnodes 3 contradicts LWS_GROUP_SIZE 2"),
        (
            ParallelSettings(),
            LWS | {"LWS_WORKER_INDEX": "2"},
            "LWS_WORKER_INDEX is 2, must be 0 to 1",
        ),
        (ParallelSettings(), LWS | {"LWS_GROUP_SIZE": "0"}, "LWS_GROUP_SIZE 0 must be at least 1"),
        (
            ParallelSettings(tensor_parallel_size=2, nnodes=2),
            {},
            "a group of several nodes needs master_addr and master_port: where rank 0 is",
        ),
        (
            ParallelSettings(tensor_parallel_size=-1),
            {},
            "tensor_parallel_size is -1, must be 1 to 1024",
        ),
    ],
)
def test_contradictions_are_one_line(
    settings: ParallelSettings, environment: dict[str, str], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_parallel_config(settings, environment)
    assert caught.value.message == line
