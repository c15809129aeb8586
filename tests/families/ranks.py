"""A worker of two ranks for one model after another: this process and `rank_1.py`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from splitserve.engine.factory import EngineConfig, open_engine
from splitserve.launcher.config import free_ports
from splitserve.models.config import ModelConfig
from splitserve.models.planner import ModelPlanner
from splitserve.parallel.engine import GroupEngine
from splitserve.parallel.rendezvous import LOOPBACK, ParallelConfig
from splitserve.parallel.shard import Shard
from splitserve.weights.source import MatrixSource


class TwoRanks:
    """Opens workers whose second rank is always the same process."""

    def __init__(self) -> None:
        self._rank_1 = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_1.py"))],
            stdin=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def open(self, config: EngineConfig) -> Iterator[GroupEngine]:
        """Closes both ranks' parts at the end. Raises what opening raises on either."""
        [port] = free_ports(1)
        assert self._rank_1.stdin
        print(port, file=self._rank_1.stdin, flush=True)
        engine = open_engine(config, ParallelConfig(2, 0, 1, 0, 2, LOOPBACK, port))
        try:
            yield engine
        finally:
            engine.close()

    def close(self) -> None:
        self._rank_1.communicate(timeout=10)


def check_shares(config: ModelConfig) -> None:
    """What both ranks read is a whole tensor, or a KV head that there is only one of."""
    whole = _taken(config, Shard())
    first, second = (_taken(config, Shard(rank, 2)) for rank in range(2))
    assert whole.keys() == first.keys() | second.keys()
    replicated = config.names.qkv if config.attention.num_kv_heads < 2 else ()
    for key, everything in whole.items():
        nothing = torch.zeros_like(everything)
        mine, other = first.get(key, nothing), second.get(key, nothing)
        assert torch.equal(mine | other, everything), key
        if not torch.equal(mine, other) and not any(name in key[0] for name in replicated):
            assert not (mine & other).any(), key


def _taken(config: ModelConfig, shard: Shard) -> Mapping[tuple[str, int], Tensor]:
    """Which elements of each tensor, and of each of a stack, a rank reads."""
    taken: dict[tuple[str, int], Tensor] = {}
    for source in ModelPlanner(config, shard).sources():
        mask = taken.setdefault(
            (source.name, source.index), torch.zeros(source.shape, dtype=torch.bool)
        )
        for rows in source.rows or (range(source.shape[0]),):
            part = mask[rows.start : rows.stop]
            if isinstance(source, MatrixSource) and source.columns is not None:
                part = part[:, source.columns.start : source.columns.stop]
            part[:] = True
    return taken
