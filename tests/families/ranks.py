"""Two ranks of a family, in two threads. A module of tests names its cases and imports
`test_two_ranks`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from splitserve.models.config import ModelConfig
from splitserve.models.planner import ModelPlanner
from splitserve.parallel.shard import Shard
from splitserve.weights.checkpoint import open_checkpoint
from splitserve.weights.source import MatrixSource

from . import parity
from .parity import Case


def test_two_ranks(case: Case, tmp_path: Path) -> None:
    """Both have the logits of one alone, and between them they read each weight once."""
    model = parity.random_model(case.config, seed=len(case.name))
    path = parity.save(model, tmp_path / "model")
    config = open_checkpoint(path).config
    _check_shares(config)
    tokens = parity.prompt_of(config.vocab_size, seed=4)
    alone = parity.chunked_logits(parity.open_engine(path, context=case.context), tokens)
    for logits in _logits_of_ranks(path, case.context, tokens):
        assert (logits - alone).abs().max() < parity.MAX_LOGIT_ERROR


class ThreadGroup:
    """See `parallel.group.Group`. Ranks are threads, `shared` has a place for each."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list[Tensor]) -> None:
        self.rank = rank
        self.size = barrier.parties
        self._barrier = barrier
        self._shared = shared

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather_columns(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=1)

    def broadcast(self, x: Tensor) -> Tensor:
        return self._exchange(x)[0]

    def close(self) -> None:
        pass

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._shared[self.rank] = x.clone()
        self._barrier.wait(timeout=60)
        everyone = list(self._shared)
        self._barrier.wait(timeout=60)
        return everyone


def _logits_of_ranks(path: Path, context: int, tokens: Sequence[int]) -> list[Tensor]:
    barrier, shared = threading.Barrier(2), [torch.empty(0)] * 2

    def run(rank: int) -> Tensor:
        try:
            group = ThreadGroup(rank, barrier, shared)
            return parity.chunked_logits(
                parity.open_engine(path, context=context, group=group), tokens
            )
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


def _check_shares(config: ModelConfig) -> None:
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
